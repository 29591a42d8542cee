"""The paged KV cache: a fixed number of blocks, allocated once. `block_pool` tracks who holds which."""

from __future__ import annotations

from math import ceil

import torch

from antiphon.comm import RankGroup
from antiphon.config.cache import CacheSize, block_bytes
from antiphon.config.engine_config import ResolvedConfig
from antiphon.config.memory import is_out_of_memory
from antiphon.core.batch import Batch, RequestSlice
from antiphon.core.errors import OptionError, first_line
from antiphon.core.plan import Plan
from antiphon.engine.runner import Runner
from antiphon.models import CausalLM, ModelConfig
from antiphon.runtime import Streams
from antiphon.splitting import join, split

_GIB = 2**30
_SCATTER = 2_654_435_761  # Knuth's multiplier: neighboring places of a text get tokens that are far apart


def allocate_cache(
    config: ModelConfig,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Allocate zeros [layers, num_blocks, block_size, kv_width], by default on the CPU. The cache never grows."""
    try:
        return torch.zeros(config.num_layers, num_blocks, block_size, config.kv_width, dtype=dtype, device=device)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # the last two: the size exceeds 64 bits
        size = num_blocks * block_bytes(config, block_size=block_size, dtype=dtype)
        raise OptionError(
            f"a KV cache of {size} bytes cannot be allocated on this rank",
            limit=first_line(error),
            remedy="use a lower kv_cache_memory (--kv-cache-memory), or a lower max_model_len (--max-model-len)",
            option="kv_cache_memory",
            value=size,
        ) from error


def blocks_that_fit(*, total_bytes: int, used_bytes: int, utilization: float, bytes_per_block: int) -> int:
    """How many blocks fit into the share `utilization` of a device, next to `used_bytes`, the peak without a cache."""
    return max(0, int(total_bytes * utilization) - used_bytes) // bytes_per_block


def measured_cache(
    config: ResolvedConfig, model: CausalLM, *, streams: Streams, group: RankGroup, beside_bytes: int = 0
) -> CacheSize:
    """Size the cache by what the largest unsplit step leaves free on the rank with the least room.

    beside_bytes: memory that this rank needs besides, for decode steps and their graphs.

    All ranks must call it together, with their weights loaded. It binds a cache of one block, which the caller
    replaces. Raises `OptionError`, on every rank, if a rank has no room for two blocks.
    """
    # Ranks load at different speeds: wait here rather than inside a step, whose time limit may be shorter.
    group.all_gather_object("loaded")
    device = streams.owner
    device.reset_peak()
    run_largest_step(config, model, streams=streams, rank=group.rank)
    used_bytes, total_bytes = device.peak_bytes() + beside_bytes, device.memory().total_bytes
    device.reset_peak()
    utilization = config.options.gpu_memory_utilization
    bytes_per_block = block_bytes(config.model, block_size=config.options.block_size, dtype=config.dtype)
    num_blocks = blocks_that_fit(
        total_bytes=total_bytes, used_bytes=used_bytes, utilization=utilization, bytes_per_block=bytes_per_block
    )
    num_blocks, used_bytes, total_bytes = min(group.all_gather_object((num_blocks, used_bytes, total_bytes)))
    fact = (
        f"{utilization:.0%} of {total_bytes / _GIB:.1f} GiB less {used_bytes / _GIB:.1f} GiB for weights, buffers, "
        f"{'decode steps, ' if beside_bytes else ''}and a step of {config.max_num_batched_tokens} tokens"
    )
    if num_blocks < 2:
        raise OptionError(
            "there is no room for the KV cache",
            limit=f"{fact} leave {num_blocks} blocks of {bytes_per_block} bytes, and 2 are needed",
            remedy="use more ranks, a lower max_num_batched_tokens or a higher gpu_memory_utilization",
            option="gpu_memory_utilization",
            value=utilization,
        )
    return CacheSize(num_blocks=num_blocks, source=fact)


@torch.inference_mode()
def run_largest_step(config: ResolvedConfig, model: CausalLM, *, streams: Streams, rank: int) -> None:
    """Run serial prefill steps of `max_num_batched_tokens` on every rank, with the logits of `max_num_seqs` requests.

    The first step has whole prompts. If a text can be longer than a step, a second step computes the last chunk of the
    longest text, whose attention reads all of it. Every block is block 0, so the values mean nothing.
    """
    options, num_tokens = config.options, config.max_num_batched_tokens
    cache = allocate_cache(
        config.model, num_blocks=1, block_size=options.block_size, dtype=config.dtype, device=streams.device
    )
    model.bind_kv_cache(cache)
    plan = Plan(part_tokens=((num_tokens,),) * options.ranks, reason="the largest step, to measure its memory")
    runner, longest = Runner(model, streams=streams), _longest_text(config, streams)
    contexts = [0] if longest <= num_tokens else [0, longest - num_tokens]
    try:
        for context_len in contexts:
            batch = largest_batch(
                rank,
                num_tokens=num_tokens,
                longest=min(num_tokens, longest),
                context_len=context_len,
                vocab_size=config.model.vocab_size,
                block_size=options.block_size,
            )
            hidden_TD = join(runner.run(split(batch, plan, block_size=options.block_size)))
            logits_NV = model.logits(hidden_TD[: options.max_num_seqs])
            logits_NV.clone()  # the sampler makes a copy too
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        behind = f" after a text of {context_len} tokens" if context_len else ""
        lower = "a lower max_model_len (--max-model-len), " if context_len else ""
        raise OptionError(
            f"a step of max_num_batched_tokens={num_tokens} tokens{behind} does not fit into the memory that the "
            "weights leave free",
            limit=first_line(error),
            remedy=f"use {lower}a lower max_num_batched_tokens or more ranks",
            option="max_num_batched_tokens",
            value=num_tokens,
        ) from error


def _longest_text(config: ResolvedConfig, streams: Streams) -> int:
    """The longest text that can run: at most what the model allows, and at most what the device's memory can cache."""
    block = block_bytes(config.model, block_size=config.options.block_size, dtype=config.dtype)
    in_memory = streams.owner.memory().total_bytes // block * config.options.block_size
    return min(config.max_model_len, max(in_memory, config.max_num_batched_tokens))


def largest_batch(
    rank: int, *, num_tokens: int, longest: int, vocab_size: int, block_size: int, context_len: int = 0
) -> Batch:
    """Make prompts of `num_tokens` in all, each as long as possible, because attention then takes most memory.

    context_len: tokens of each text that are already in the cache.
    """
    lengths = [longest] * (num_tokens // longest) + [num_tokens % longest] * (num_tokens % longest > 0)
    return Batch(
        rank=rank,
        requests=tuple(
            RequestSlice(
                request_id=number,
                token_ids=tuple((number + 1) * (place + 1) * _SCATTER % vocab_size for place in range(length)),
                context_len=context_len,
                block_ids=(0,) * ceil((context_len + length) / block_size),
            )
            for number, length in enumerate(lengths)
        ),
    )
