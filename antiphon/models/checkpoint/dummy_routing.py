"""Routing of runs with dummy weights: by the random router, or by a fixed table of known balance.

    spec = parse_routing("zipf:1.2")
    model = build_model(config, transport, spec)

With a table, every router still does all of its work, so that its time is measured, but only its weights are used. A
token's row in the table is its slot in the KV cache. Routes therefore do not depend on the split, the plan or the
transport, and all arms of a benchmark route tokens alike. All layers share one table, unless it is recorded.

Shapes: `T` tokens, `K` experts per token, `E` experts, `N` rows of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import nn

from antiphon.comm import Routes
from antiphon.core.batch import current_micro_batch
from antiphon.core.errors import OptionError, unknown_value
from antiphon.core.lines import json_lines
from antiphon.kernels.router import PairCounts, count_pairs, hide_padding
from antiphon.models.layers import checkpoint_tensors
from antiphon.models.router import Router

NUM_ROWS = 32768
"""Rows of a generated table; rank r of W begins at row r * N / W."""


class RoutingKind(Enum):
    """The kinds of routing, named as in the option."""

    MODEL = "model"
    UNIFORM = "uniform"
    ZIPF = "zipf"
    RECORDED = "recorded"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSpec:
    """The parsed value of `--routing`."""

    kind: RoutingKind = RoutingKind.MODEL
    exponent: float = 0.0  # zipf: an expert's share falls with this power of its rank in popularity
    file: Path | None = None  # recorded

    def __str__(self) -> str:
        if self.kind is RoutingKind.ZIPF:
            return f"zipf:{self.exponent:g}"
        return self.kind.value if self.file is None else f"recorded:{self.file}"


def parse_routing(text: str) -> RoutingSpec:
    """`model`, `uniform`, `zipf:A` with A above 0, or `recorded:FILE`. Raises `OptionError` for anything else."""
    name, colon, value = text.partition(":")
    if name in (RoutingKind.MODEL.value, RoutingKind.UNIFORM.value) and not colon:
        return RoutingSpec(kind=RoutingKind(name))
    if name == RoutingKind.ZIPF.value:
        try:
            exponent = float(value)
        except ValueError:
            exponent = 0.0
        if not 0.0 < exponent < float("inf"):
            raise OptionError(
                f"routing={text!r} has no exponent above 0",
                remedy="write it like zipf:1.2",
                option="routing",
                value=text,
            )
        return RoutingSpec(kind=RoutingKind.ZIPF, exponent=exponent)
    if name == RoutingKind.RECORDED.value:
        if not value:
            raise OptionError(
                f"routing={text!r} names no file",
                remedy="write it like recorded:routes.jsonl",
                option="routing",
                value=text,
            )
        return RoutingSpec(kind=RoutingKind.RECORDED, file=Path(value))
    raise unknown_value("routing", text, ("model", "uniform", "zipf:A", "recorded:FILE"))


class RouteTable:
    """A table, and its rows for each lane's current micro-batch: the first layer looks them up for all layers.

    table_NK: int64, with distinct ids in each row.
    """

    def __init__(self, table_NK: torch.Tensor) -> None:
        self.table_NK = table_NK
        self.num_users = 0
        self.counts: PairCounts | None = None  # of all layers that share the table, while the load is counted
        self._rows_by_lane: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def ids(self, *, look_up: bool) -> torch.Tensor:
        """The expert ids [T, K] of the current micro-batch, -1 for padding; not to be changed.

        look_up: even if already known.
        """
        part = current_micro_batch()
        slots_T = part.attention.slots_T
        known_T, ids_TK = self._rows_by_lane.get(part.lane, (None, None))
        if look_up or known_T is not slots_T or ids_TK is None:
            ids_TK = self.table_NK[slots_T.remainder(self.table_NK.shape[0])]
            if part.num_real_1 is not None:
                ids_TK = hide_padding(ids_TK, part.num_real_1)
            self._rows_by_lane[part.lane] = (slots_T, ids_TK)
            if self.counts is not None:
                count_pairs(ids_TK, self.counts)
        return ids_TK


class TableRouter(nn.Module):
    """A router whose choice is replaced by a table."""

    def __init__(self, router: Router, table: RouteTable) -> None:
        super().__init__()
        self.router = router
        self.table = table
        # Layers are built in order. The first one always looks up: what a tensor holds may change between steps.
        self.first = table.num_users == 0
        table.num_users += 1

    def forward(self, x_TD: torch.Tensor, num_real_1: torch.Tensor | None = None) -> Routes:
        return Routes(self.table.ids(look_up=self.first), self.router.forward(x_TD).weights_TK)

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the router, under the names that it has without a table."""
        return checkpoint_tensors(self.router, f"{prefix}gate.")


def routing_tables(
    spec: RoutingSpec, *, num_experts: int, top_k: int, layers: Iterable[int], rank: int, num_ranks: int
) -> dict[int, torch.Tensor]:
    """The table of each of `layers` on one rank: int64 [N, K] on the CPU. Generated ones are one object for all layers.

    The same arguments give the same tables everywhere. Raises `OptionError` for a recording that does not fit.
    """
    if spec.kind is RoutingKind.RECORDED:
        assert spec.file is not None
        recorded = _read_recording(spec.file, num_experts=num_experts, top_k=top_k)
        missing = sorted(set(layers) - recorded.keys())
        if missing:
            raise OptionError(
                f"{spec.file} has no routes of layer {missing[0]}",
                remedy="record every layer with experts",
                option="routing",
                value=str(spec),
            )
        return {layer: _from_rank(recorded[layer], rank, num_ranks) for layer in layers}
    if spec.kind is RoutingKind.UNIFORM:
        table_NK = _uniform_table(num_experts, top_k)
    else:
        assert spec.kind is RoutingKind.ZIPF
        table_NK = _zipf_table(num_experts, top_k, spec.exponent)
    return dict.fromkeys(layers, _from_rank(table_NK, rank, num_ranks))


def _from_rank(table_NK: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    return table_NK.roll(-(rank * table_NK.shape[0] // num_ranks), dims=0)


def _uniform_table(num_experts: int, top_k: int) -> torch.Tensor:
    """Permutations of all experts, one after the other, dealt K at a time, so every stretch of rows is balanced."""
    generator = torch.Generator().manual_seed(num_experts)
    dealt: list[int] = []
    while len(dealt) < NUM_ROWS * top_k:
        deck: list[int] = torch.randperm(num_experts, generator=generator).tolist()
        begun = set(dealt[len(dealt) - len(dealt) % top_k :])  # of the row that this permutation completes
        dealt.extend(sorted(deck, key=begun.__contains__))
    return torch.tensor(dealt[: NUM_ROWS * top_k]).view(NUM_ROWS, top_k)


def _zipf_table(num_experts: int, top_k: int, exponent: float) -> torch.Tensor:
    """K distinct experts per row, drawn one by one with shares 1, 2^-A, 3^-A, ...; which are popular is drawn too.

    Because the experts of a row are distinct, none gets more than 1 / K of the load, whatever its share.
    """
    generator = torch.Generator().manual_seed(num_experts)
    log_share_E = -exponent * torch.arange(1, num_experts + 1, dtype=torch.float64).log()
    log_share_E = log_share_E[torch.randperm(num_experts, generator=generator)]
    noise_NE = torch.rand(NUM_ROWS, num_experts, generator=generator, dtype=torch.float64)
    # The K largest values of log share + Gumbel noise are such a draw (Vieira, "Gumbel-max trick and weighted reservoir
    # sampling").
    return (log_share_E - noise_NE.log().neg().log()).topk(top_k).indices


def _read_recording(file: Path, *, num_experts: int, top_k: int) -> dict[int, torch.Tensor]:
    """Read JSON lines, one per layer: `{"layer": 3, "ids": [[5, 17, ...], ...]}`, one row of K ids per token."""

    def fault(fact: str, remedy: str) -> OptionError:
        return OptionError(fact, remedy=remedy, option="routing", value=f"recorded:{file}")

    tables = {}
    try:
        for _, entry in json_lines(file.read_text(encoding="utf-8-sig")):
            tables[int(entry["layer"])] = torch.tensor(entry["ids"], dtype=torch.int64)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:  # torch: numbers too large
        raise fault(
            f"{file} cannot be read as a recording ({error!r})",
            'write each line as {"layer": number, "ids": [[expert, ...], ...]}',
        ) from error
    for layer, table_NK in tables.items():
        if table_NK.dim() != 2 or table_NK.shape[1] != top_k or not table_NK.numel():
            raise fault(f"{file}: ids of layer {layer} have shape {list(table_NK.shape)}", f"record [tokens, {top_k}]")
        low, high = int(table_NK.min()), int(table_NK.max())
        if low < 0 or high >= num_experts:
            raise fault(f"{file}: ids of layer {layer} range from {low} to {high}", f"use 0 to {num_experts - 1}")
        if bool((table_NK.sort(dim=1).values.diff(dim=1) == 0).any()):
            raise fault(f"{file}: layer {layer} has a token with the same expert twice", "record distinct experts")
    return tables
