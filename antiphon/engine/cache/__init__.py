"""The paged KV cache of one rank: `kv_cache` sizes and allocates it, `BlockPool` knows who holds which block."""
