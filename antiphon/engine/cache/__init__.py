"""The paged KV cache of one rank: `kv_cache` sizes and allocates it, `BlockPool` tracks who holds which block."""
