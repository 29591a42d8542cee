"""The plan of a step, and the proposals from which the ranks compute it.

A `Proposal` is what one rank sends before a step, packed into a fixed-size row of int64. Every rank computes the same
`Plan` from all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

MAX_LANES = 8
"""Maximum number of lanes in a plan, because the row has a fixed size."""

_FIXED_FIELDS = 8
ROW_SIZE = _FIXED_FIELDS + MAX_LANES
"""Length of a row, in int64 words."""


class SerialReason(IntEnum):
    """Why a rank cannot cut its batch."""

    NONE = 0
    TOO_FEW_TOKENS = 1
    NO_BOUNDARY = 2

    @property
    def text(self) -> str:
        return _SERIAL_TEXT[self]


_SERIAL_TEXT = {
    SerialReason.NONE: "can be cut",
    SerialReason.TOO_FEW_TOKENS: "fewer tokens than lanes",
    SerialReason.NO_BOUNDARY: "no request boundary near the cut",
}


class EagerReason(IntEnum):
    """Why a step is not padded to a fixed size."""

    NONE = 0
    PROMPTS = 1
    TOO_LARGE = 2
    NO_SIZES = 3

    @property
    def text(self) -> str:
        return _EAGER_TEXT[self]


_EAGER_TEXT = {
    EagerReason.NONE: "is padded",
    EagerReason.PROMPTS: "it has prompt tokens",
    EagerReason.TOO_LARGE: "more sequences than the largest size",
    EagerReason.NO_SIZES: "no sizes for its number of lanes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What one rank proposes for the next step.

    part_tokens: tokens of each lane if the step is split; one entry if this rank's batch cannot be cut. wave: number of
    the newest frontend message that the rank has seen. policy: fingerprint of the overlap policy. order: fingerprint of
    the collectives issued so far (0: not recorded). Ranks must agree on policy and order. num_prefill_tokens: how many
    of `num_tokens` belong to prompts.
    """

    num_tokens: int
    decode_only: bool
    part_tokens: tuple[int, ...]
    num_prefill_tokens: int = 0
    refusal: SerialReason = SerialReason.NONE
    wave: int = 0
    policy: int = 0
    order: int = 0

    @property
    def can_split(self) -> bool:
        return len(self.part_tokens) > 1

    def to_row(self) -> list[int]:
        """The row to exchange: `ROW_SIZE` integers."""
        assert len(self.part_tokens) <= MAX_LANES
        fixed = [
            self.num_tokens,
            int(self.decode_only),
            int(self.refusal),
            self.wave,
            self.policy,
            self.order,
            self.num_prefill_tokens,
            len(self.part_tokens),
        ]
        return fixed + list(self.part_tokens) + [0] * (MAX_LANES - len(self.part_tokens))

    @staticmethod
    def from_row(row: list[int]) -> Proposal:
        """The inverse of `to_row`."""
        num_parts = row[_FIXED_FIELDS - 1]
        return Proposal(
            num_tokens=row[0],
            decode_only=bool(row[1]),
            refusal=SerialReason(row[2]),
            wave=row[3],
            policy=row[4],
            order=row[5],
            num_prefill_tokens=row[6],
            part_tokens=tuple(row[_FIXED_FIELDS : _FIXED_FIELDS + num_parts]),
        )


def plan_kind(num_lanes: int) -> str:
    """`serial`, `dual`, `3-lane`, ..."""
    return {1: "serial", 2: "dual"}.get(num_lanes, f"{num_lanes}-lane")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One step's plan, equal on all ranks.

    An eager step runs one row per token. A padded step (`graph`) runs the same number of rows in every lane of every
    rank, so that all shapes are known in advance.
    """

    part_tokens: tuple[tuple[int, ...], ...]  # [data-parallel replica][lane], real tokens
    graph: int = 0  # rows of every lane in a padded step; 0 in an eager one
    eager: EagerReason = EagerReason.NONE  # why the step is not padded
    reason: str  # a short fixed text, counted in the statistics
    detail: str = ""  # the numbers behind the reason
    idle: bool = False  # no rank has work, and all ranks have seen the same messages

    @property
    def num_lanes(self) -> int:
        return len(self.part_tokens[0])

    @property
    def kind(self) -> str:
        return plan_kind(self.num_lanes)

    @property
    def is_empty(self) -> bool:
        """Whether no rank has a token to run in this step."""
        return not any(any(parts) for parts in self.part_tokens)

    def unsplit(self) -> Plan:
        """The same tokens on one lane, for the layers of a split step that are not split."""
        assert not self.graph, f"a step padded to {self.graph} splits all its layers"
        return replace(self, part_tokens=tuple((sum(parts),) for parts in self.part_tokens))

    def rows_by_rank(self, lane: int) -> tuple[int, ...]:
        """Rows of this lane on every rank: its tokens, or the padded size."""
        return tuple(self.graph or parts[lane] for parts in self.part_tokens)

    def __str__(self) -> str:
        padded = f", padded to {self.graph} a lane" if self.graph else ""
        return f"{self.kind}: {self.detail or self.reason}{padded}"
