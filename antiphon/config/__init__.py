"""All options of an engine, the resolution of `auto`, and the start-up block; the entry point is `EngineConfig`."""
