"""Attention layers over the paged KV cache (`gqa`, `mla`), what they share (`paged`), and rotary angles (`rope`)."""
