"""Attention over the paged cache behind one contract, with a backend for each library that computes it."""

from antiphon.kernels.attention.base import AttentionBackend, AttentionShape
from antiphon.kernels.attention.registry import AUTO_ORDER, BACKEND_NAMES, choose_backend, find_backend, refusals

__all__ = [
    "AUTO_ORDER",
    "BACKEND_NAMES",
    "AttentionBackend",
    "AttentionShape",
    "choose_backend",
    "find_backend",
    "refusals",
]
