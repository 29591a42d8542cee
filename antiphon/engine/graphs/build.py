"""Making the padded steps of a rank, and measuring the memory that capturing them takes."""

from __future__ import annotations

from antiphon.comm import RankGroup, Transport
from antiphon.config.engine_config import ResolvedConfig
from antiphon.engine.cache.kv_cache import allocate_cache
from antiphon.engine.graphs.padded_steps import Ladders, PaddedSteps
from antiphon.engine.graphs.static_inputs import StaticInputs
from antiphon.engine.runner import Runner
from antiphon.engine.sampling.new_tokens import NewTokens
from antiphon.models import CausalLM


def most_rows(config: ResolvedConfig, ladders: Ladders) -> int:
    """Rows of the largest step, over all lanes: padded ones, and requests of an eager one."""
    return max([config.options.max_num_seqs, *(lanes * ladder[-1] for lanes, ladder in ladders.items())])


def make_padded_steps(
    config: ResolvedConfig,
    model: CausalLM,
    runner: Runner,
    transport: Transport,
    new_tokens: NewTokens,
    ladders: Ladders,
) -> PaddedSteps | None:
    """The padded steps of these sizes, not captured; `None` without sizes."""
    if not ladders:
        return None
    block_size = config.options.block_size
    inputs = StaticInputs(
        num_lanes=max(ladders),
        max_rows=max(ladder[-1] for ladder in ladders.values()),
        max_blocks=-(-config.max_model_len // block_size),
        block_size=block_size,
        streams=transport.streams,
    )
    return PaddedSteps(model, runner, inputs, new_tokens, transport, max_rows=most_rows(config, ladders))


def measured_graphs(config: ResolvedConfig, model: CausalLM, transport: Transport, ladders: Ladders) -> int:
    """Bytes of device memory that capturing all sizes will take, measured on a few of them.

    All ranks must call it together. It binds a cache of one block, which the caller replaces. The largest sizes
    show what all graphs share, the smallest one what every further graph adds.
    """
    device = transport.streams.owner
    cache = allocate_cache(
        config.model,
        num_blocks=1,
        block_size=config.options.block_size,
        dtype=config.dtype,
        device=transport.streams.device,
    )
    model.bind_kv_cache(cache)
    new_tokens = NewTokens(most_rows(config, ladders), transport.streams)
    runner = Runner(model, streams=transport.streams)
    padded = make_padded_steps(config, model, runner, transport, new_tokens, ladders)
    assert padded is not None
    alone = RankGroup(rank=0, size=1)  # every rank measures for itself, in step with the others
    largest = padded.capture({lanes: ladder[-1:] for lanes, ladder in ladders.items()}, alone)
    smallest = padded.capture({1: ladders[1][:1]}, alone)
    num_sizes = sum(map(len, ladders.values()))
    del padded, cache
    device.release_unused()
    return largest.num_bytes + num_sizes * smallest.num_bytes
