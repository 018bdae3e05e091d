"""An encyclopaedia that is made up: what it says, how it is searched, and questions that it answers."""
