"""Making the padded steps of a rank, and measuring the memory that capturing them takes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from antiphon.comm import RankGroup, Transport
from antiphon.config.cache import CacheSize
from antiphon.config.engine_config import ResolvedConfig
from antiphon.core.batch import Batch, RequestSlice
from antiphon.core.plan import Plan
from antiphon.engine.cache.kv_cache import allocate_cache
from antiphon.engine.graphs.padded_steps import Ladders, PaddedSteps
from antiphon.engine.graphs.static_inputs import StaticInputs
from antiphon.engine.runner import Runner
from antiphon.engine.sampling.new_tokens import NewTokens
from antiphon.models import CausalLM
from antiphon.planning import MeasuredDecode
from antiphon.planning.measured import combine

_MEASURED_CONTEXT = 1024
_ROUNDS, _REPLAYS = 3, 4
_MEASURED_SIZES = (2, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)


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
        rows_by_lane=[
            max(ladder[-1] for lanes, ladder in ladders.items() if lanes > lane) for lane in range(max(ladders))
        ],
        max_blocks=-(-config.max_model_len // block_size),
        block_size=block_size,
        streams=transport.streams,
    )
    return PaddedSteps(model, runner, inputs, new_tokens, transport, max_rows=most_rows(config, ladders))


def measured_graphs(
    config: ResolvedConfig, model: CausalLM, transport: Transport, ladders: Ladders, group: RankGroup
) -> int:
    """Bytes of device memory that capturing all sizes will take, measured on a few of them.

    All ranks must call it together. It binds a cache of one block, which the caller replaces. The largest sizes
    show what all graphs share, the smallest ones what every further graph adds.
    """
    # Ranks get here at different times: wait here rather than inside a step, whose time limit may be shorter.
    group.all_gather_object("experts are ready")
    device = transport.streams.owner
    device.release_unused()
    free_before = device.memory().free_bytes
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
    padded.capture({lanes: ladder[-1:] for lanes, ladder in ladders.items()}, group)
    num_bytes = free_before - device.memory().free_bytes
    for lanes, ladder in ladders.items():
        smallest = padded.capture({lanes: ladder[:1]}, group)
        num_bytes += (len(ladder) - 1) * smallest.num_bytes
    del padded, cache, new_tokens
    device.release_unused()
    return num_bytes


def measure_decode(
    padded: PaddedSteps, config: ResolvedConfig, cache: CacheSize, group: RankGroup, transport: Transport
) -> MeasuredDecode | None:
    """Time captured steps of both plans, in turn, with random tokens. All ranks must call it together.

    It writes into free blocks of the KV cache, whose contents nobody knows yet.
    """
    ladders, lanes = padded.ladders, config.options.policy.micro_batches
    found = []
    for size in _measured_sizes(ladders.get(1, ())):
        rows = next((rows for rows in ladders.get(lanes, ()) if rows * lanes >= size), 0)
        if not rows:
            continue
        batch = _decoding(config, cache, size, group.rank)
        cut = tuple(size * (lane + 1) // lanes - size * lane // lanes for lane in range(lanes))
        plans = [
            Plan(part_tokens=(parts,) * transport.group.size, graph=graph, reason="measured")
            for parts, graph in (((size,), size), (cut, rows))
        ]
        times: list[list[float]] = [[], []]
        for _ in range(_ROUNDS):
            for plan, ms in zip(plans, times, strict=True):
                group.all_gather_object("ready")  # so that no rank's time contains another one's delay
                ms.append(padded.replay_ms(batch, plan, repeats=_REPLAYS))
        found.append((size, median(times[0]), median(times[1])))
    return combine(group.all_gather_object(found), most_serial=ladders.get(1, (0,))[-1])


def _measured_sizes(ladder: Sequence[int]) -> Sequence[int]:
    """Enough sizes of a ladder to see where another plan becomes faster, the largest among them."""
    chosen = [size for size in ladder if size in _MEASURED_SIZES or size == ladder[-1]]
    return chosen if len(chosen) > 2 else ladder[1:] or ladder


def _decoding(config: ResolvedConfig, cache: CacheSize, num_sequences: int, rank: int) -> Batch:
    """So many sequences that decode, of 1,024 tokens or what the cache holds, in blocks of their own if it has them."""
    block_size, num_blocks = config.options.block_size, cache.num_blocks - 1
    most = max(1, num_blocks // num_sequences) * block_size
    context = max(1, min(_MEASURED_CONTEXT, config.max_model_len - 1, most - 1))
    used = -(-(context + 1) // block_size)
    return Batch(
        rank=rank,
        requests=tuple(
            RequestSlice(
                request_id=-1 - number,  # no request of a user has it
                token_ids=((7919 * (number + 1) + 104729 * rank) % config.model.vocab_size,),
                context_len=context,
                block_ids=[1 + (number * used + block) % num_blocks for block in range(used)],
            )
            for number in range(num_sequences)
        ),
    )
