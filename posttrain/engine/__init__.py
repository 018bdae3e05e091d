"""Engines: where tokens are sampled."""
