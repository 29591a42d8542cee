"""One reader per architecture, and the registry that finds it by the name in `config.json`: `read_config`."""
