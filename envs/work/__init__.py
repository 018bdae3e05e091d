"""Work: API environments over a database, generated from the tool graphs of domains. A domain is one file of data."""
