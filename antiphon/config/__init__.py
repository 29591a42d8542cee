"""Every option of an engine, the resolution of `auto`, and the start-up block. Entry: `EngineConfig`."""
