"""Architectures by the name in `config.json`: one reader each, and their registry."""
