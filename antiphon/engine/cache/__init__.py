"""The paged KV cache of one rank: its size, its tensors, and who holds which block."""
