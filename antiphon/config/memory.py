"""Checks whether an engine fits into the host's memory, before anything is allocated.

On CPUs, the sizes of weights and KV caches are known from the start. On GPUs they are measured (`cache_size`).
"""

from __future__ import annotations

import torch

from antiphon.config.cache import block_bytes
from antiphon.config.engine_config import ResolvedConfig
from antiphon.core.errors import OptionError
from antiphon.machine.advice import format_bytes
from antiphon.machine.host import obtainable_memory
from antiphon.models import weight_bytes

_ALLOCATOR_WORDS = ("can't allocate memory", "not enough memory")  # in torch's errors on CPUs


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; on a CPU torch raises a plain `RuntimeError` for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR_WORDS)


def check_memory(config: ResolvedConfig) -> None:
    """Check, before the ranks start, that weights and KV caches fit into the memory that the host has available.

    Raises `OptionError` if they do not, and `ModelError` for sizes that no tensor can have.
    """
    weights = weight_bytes(config.model, config.dtype, config.options.mesh.ep)
    limit = obtainable_memory()
    if config.device.own_memory or config.cache is None or limit is None:
        return
    ranks = config.options.ranks
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    if ranks * weights > limit:
        narrower = "dtype='bfloat16', " if config.dtype.itemsize > torch.bfloat16.itemsize else ""
        raise OptionError(
            f"the weights of {config.options.model} take {format_bytes(weights)}{each} in {config.dtype_name}, and "
            f"only {format_bytes(limit)} is available on this host",
            remedy=f"use {narrower}a lower num_layers (--num-layers), or a host with more memory",
            option="num_layers",
            value=config.options.num_layers,
        )
    cache = config.cache.num_blocks * block_bytes(
        config.model, block_size=config.options.block_size, dtype=config.dtype
    )
    if ranks * (weights + cache) > limit:
        raise OptionError(
            f"the KV cache takes {format_bytes(cache)}{each} ({_why_so_large(config)}) beside {format_bytes(weights)} "
            f"of weights, and only {format_bytes(limit)} is available on this host",
            remedy=f"use {_remedy(config)}",
            option="kv_cache_memory",
            value=config.options.kv_cache_memory,
        )


def _why_so_large(config: ResolvedConfig) -> str:
    assert config.cache is not None
    if config.options.kv_cache_memory is not None:
        return config.cache.source
    return f"{config.cache.source}, {config.max_model_len} tokens in blocks of {config.options.block_size}"


def _remedy(config: ResolvedConfig) -> str:
    if config.options.kv_cache_memory is not None:
        return "a lower kv_cache_memory (--kv-cache-memory)"
    smaller_blocks = "a lower block_size (--block-size), " if config.options.block_size > config.max_model_len else ""
    return (
        f"{smaller_blocks}a lower max_model_len (--max-model-len), or set kv_cache_memory "
        "(--kv-cache-memory) to limit it"
    )
