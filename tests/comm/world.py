"""What the checks of a transport share: the ranks, known experts, tokens, and the expected results.

A check runs on every rank at the same time, so it must not stop on a single one: it collects problems with `expect` and
goes on. An exception ends the check, and the ranks reconnect before the next one.

Shapes: `T` tokens, `D` hidden size, `E` experts, `K` experts per token, `R` rows received, `W` ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from antiphon.comm import ExpertShape, RankGroup, Routes, Rows, Transport, load_transport, parse_transport
from antiphon.comm.simulated import SimulatedTransport
from antiphon.comm.slab.mailbox import Phase
from antiphon.comm.slab.transport import SlabTransport
from antiphon.runtime import CpuStreams, Streams, current_lane, finish

__all__ = [
    "DTYPES",
    "MAX_TOKENS",
    "Tokens",
    "World",
    "apply_experts",
    "exact_sums",
    "make_shape",
    "make_tokens",
    "poison_arrivals",
    "poison_buffers",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

MAX_TOKENS = 64
"""Maximum number of tokens per lane in the checks."""

_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1.01 * 2.0**-7, torch.float64: 1e-12}
"""Allowed error, relative to the sum of absolute summands: partial sums and result are rounded once each."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of one rank and where they go."""

    x_TD: torch.Tensor
    routes: Routes


@dataclass(slots=True)
class World:
    """The ranks of one process group, and the problems that a check has found on this rank."""

    group: RankGroup
    streams: Streams = field(default_factory=CpuStreams)
    problems: list[str] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def size(self) -> int:
        return self.group.size

    def make(self, name: str, shape: ExpertShape, *, num_lanes: int = 1) -> Transport:
        """Make the transport of that name, even with one rank, where `create_transport` would use `local`."""
        spec = parse_transport(name)
        kind = load_transport(spec, self.streams.owner.kind)
        inner = kind(shape, group=self.group, streams=self.streams, num_lanes=num_lanes, max_tokens=MAX_TOKENS)
        return inner if spec.link is None else SimulatedTransport(inner, spec.link)

    def run(self, transport: Transport, tokens: Tokens, counts: tuple[int, ...] | None) -> torch.Tensor:
        """Dispatch, experts, combine."""
        rows = finish(transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=counts, label="check"))
        partial_RD = apply_experts(rows, transport.shape, self.group)
        poison_arrivals(transport, Phase.DISPATCH)
        if rows.out_RD is not None:
            partial_RD = rows.out_RD.copy_(partial_RD)
        return finish(transport.combine(partial_RD, label="check"))

    def tokens(
        self, shape: ExpertShape, num_tokens: int, *, seed: int | Sequence[int], experts: Sequence[int] | None = None
    ) -> Tokens:
        """`make_tokens` on this rank's device."""
        tokens = make_tokens(shape, num_tokens, seed=seed, experts=experts)
        ids_TK, weights_TK = tokens.routes.ids_TK, tokens.routes.weights_TK
        device = self.streams.device
        return Tokens(tokens.x_TD.to(device), Routes(ids_TK.to(device), weights_TK.to(device)))

    def barrier(self) -> None:
        self.group.all_gather_object(None)

    def expect(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)

    def expect_equal(self, actual: object, expected: object, what: str) -> None:
        self.expect(actual == expected, f"{what}: {actual!r} is not {expected!r}")

    def expect_sums(self, actual_TD: torch.Tensor, tokens: Tokens, what: str = "") -> None:
        """Compare the result of a combine with the plain reference."""
        expected_TD, size_TD = reference(tokens)
        if actual_TD.shape != expected_TD.shape or actual_TD.dtype != tokens.x_TD.dtype:
            self.problems.append(f"{what} result is {list(actual_TD.shape)} {actual_TD.dtype}")
            return
        error_TD = (actual_TD.double() - expected_TD).abs()
        allowed_TD = size_TD * _ROUNDING[actual_TD.dtype]
        wrong = ~(error_TD <= allowed_TD)  # not >: NaN is wrong too
        if wrong.any():
            token, column = wrong.nonzero()[0].tolist()
            self.problems.append(
                f"{what} {int(wrong.sum())} of {wrong.numel()} numbers are wrong, first [{token}, {column}]: "
                f"{actual_TD[token, column]} instead of {expected_TD[token, column]}"
            )


def make_shape(
    dtype: torch.dtype = torch.float64, *, num_experts: int = 8, top_k: int = 3, hidden_size: int = 5
) -> ExpertShape:
    """Rows have odd sizes by default, so that every part of a packed row needs its alignment."""
    return ExpertShape(num_experts=num_experts, top_k=top_k, hidden_size=hidden_size, dtype=dtype)


def make_tokens(
    shape: ExpertShape, num_tokens: int, *, seed: int | Sequence[int], experts: Sequence[int] | None = None
) -> Tokens:
    """Random tokens, each with `top_k` different experts out of `experts` (all, if left out) in random order."""
    generator = torch.Generator().manual_seed(hash(seed) % 2**60)
    pool = torch.tensor(range(shape.num_experts) if experts is None else experts, dtype=torch.int64)
    x_TD = torch.randn(num_tokens, shape.hidden_size, generator=generator, dtype=torch.float64)
    order_TX = torch.rand(num_tokens, len(pool), generator=generator).argsort(dim=1)
    weights_TK = torch.rand(num_tokens, shape.top_k, generator=generator, dtype=torch.float64) + 0.1
    routes = Routes(pool[order_TX[:, : shape.top_k]], weights_TK.to(shape.weight_dtype))
    return Tokens(x_TD.to(shape.dtype), routes)


def expert(x: torch.Tensor, number: int) -> torch.Tensor:
    """A cheap function that no two experts share and that is not the same for all columns."""
    return x * (number + 1) + x.roll(number + 1, dims=-1)


def reference(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over a token's experts, and the sum of its absolute summands: float64 [T, D] each."""
    x_TD = tokens.x_TD.double()
    ids_TK, weights_TK = tokens.routes.ids_TK, tokens.routes.weights_TK.double()
    sum_TD, size_TD = torch.zeros_like(x_TD), torch.zeros_like(x_TD)
    for number in sorted(set(ids_TK.flatten().tolist())):
        weight_T = weights_TK.masked_fill(ids_TK != number, 0).sum(1)
        y_TD = expert(x_TD, number) * weight_T.unsqueeze(1)
        sum_TD += y_TD
        size_TD += y_TD.abs()
    return sum_TD, size_TD


def apply_experts(rows: Rows, shape: ExpertShape, group: RankGroup) -> torch.Tensor:
    """Partial sums [R, D] over the experts of this rank; ids of -1 belong to other ranks."""
    num_local = shape.experts_per_rank(group.size)
    wide = shape.weight_dtype
    out_RD = torch.zeros(rows.x_RD.shape, dtype=wide, device=rows.x_RD.device)
    for local in range(num_local):
        rows_N, slots_N = (rows.ids_RK == local).nonzero(as_tuple=True)
        y_ND = expert(rows.x_RD[rows_N].to(wide), group.rank * num_local + local)
        out_RD.index_add_(0, rows_N, y_ND * rows.weights_RK[rows_N, slots_N].to(wide).unsqueeze(1))
    return out_RD.to(shape.dtype)


def exact_sums(shape: ExpertShape, group: RankGroup, tokens: Tokens) -> torch.Tensor:
    """The sums that slab transports must give to the last bit.

    They are the rounded sums of every rank's experts, added in rank order in float32 at least and rounded once.
    """
    per_rank = shape.experts_per_rank(group.size)
    total_TD = torch.zeros(tokens.x_TD.shape, dtype=shape.weight_dtype, device=tokens.x_TD.device)
    for rank in range(group.size):
        there = RankGroup(rank=rank, size=group.size, process_group=group.process_group)
        ids_TK, weights_TK = tokens.routes.ids_TK, tokens.routes.weights_TK
        rows = Rows(tokens.x_TD, ids_TK, weights_TK, first_expert=rank * per_rank, num_experts=per_rank)
        total_TD += apply_experts(rows, shape, there)
    return total_TD.to(shape.dtype)


def poison_buffers(transport: Transport) -> int:
    """Fill the transport's buffers with 0xFF bytes (NaN in all dtypes) between a combine and the next dispatch.

    Returns the number of buffers. Leaves out dispatch boxes, which a peer may have filled again: see `poison_arrivals`.
    """
    inner = transport.inner if isinstance(transport, SimulatedTransport) else transport
    if isinstance(inner, SlabTransport):
        return poison_arrivals(inner, Phase.COMBINE)
    if inner.name == "nccl-zero-cta":  # its module cannot be imported without CUDA's bindings
        buffers = list(inner._windows.values())  # type: ignore[attr-defined]
    else:
        buffers = [tensor for lane in getattr(inner, "_buffers", ()) for tensor in lane._buffers.values()]
    for buffer in buffers:
        buffer.view(torch.uint8).fill_(0xFF)
    return len(buffers)


def poison_arrivals(transport: Transport, phase: Phase) -> int:
    """Fill the peers' slabs in this lane's box of a phase after they have been read. Returns the number of slabs.

    By the protocol, no peer writes there before this rank's next signal. This rank's own slab may still be read.
    """
    inner = transport.inner if isinstance(transport, SimulatedTransport) else transport
    if not isinstance(inner, SlabTransport):
        return 0
    layout = inner.exchanges[current_lane()]
    assert layout is not None
    exchange = layout.dispatch if phase is Phase.DISPATCH else layout.combine
    box = inner.mailbox.box(current_lane(), phase)
    for arrival in exchange.arrivals:
        box[arrival.offset : arrival.offset + arrival.num_bytes].fill_(0xFF)
    return max(1, len(exchange.arrivals))
