"""The user's process: `LLM` and `AsyncEngine`, prompts and texts, and the clients that talk to ranks."""
