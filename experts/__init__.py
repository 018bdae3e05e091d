"""Who learns what: worlds, rewards and credit make one expert."""
