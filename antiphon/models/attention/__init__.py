"""Attention layers over the paged cache: grouped-query, latent, and rotary angles."""
