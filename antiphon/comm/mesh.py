"""The mesh: the axes along which the ranks of an engine work together, and the group of each axis.

    dp   data parallel      ranks with requests of their own (replicas of the attention)
    tp   tensor parallel    ranks that share the requests and the attention heads of one replica
    ep   expert parallel    all ranks; each holds a share of the experts

A rank is one process with one device. Adjacent ranks share a replica. Mesh(dp=2, tp=2) is

    rank   0     1     2     3
    dp     0     0     1     1
    tp     0     1     0     1
    ep     0     1     2     3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from antiphon.comm.group import RankGroup
from antiphon.core.errors import OptionError

Axis = Literal["dp", "tp", "ep"]


class Place(NamedTuple):
    """The index of one rank on every axis."""

    dp: int
    tp: int
    ep: int


class MeshGroups(NamedTuple):
    """The groups of one rank, one per axis."""

    dp: RankGroup
    tp: RankGroup
    ep: RankGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Sizes of the axes. `ep` defaults to dp * tp, the only valid value.

    Raises `OptionError` for sizes below 1 and for any other `ep`.
    """

    dp: int = 1
    tp: int = 1
    ep: int = 0

    def __post_init__(self) -> None:
        for axis, size in (("dp", self.dp), ("tp", self.tp)):
            if size < 1:
                raise OptionError(f"{axis}={size} is out of range", remedy="use at least 1", option=axis, value=size)
        if self.ep == 0:
            object.__setattr__(self, "ep", self.world)
        if self.ep != self.world:
            raise OptionError(
                f"ep={self.ep} does not fit dp={self.dp} and tp={self.tp}",
                limit="experts are spread over all ranks",
                remedy=f"use ep={self.world}",
                option="ep",
                value=self.ep,
            )

    def __repr__(self) -> str:
        return f"Mesh(dp={self.dp}, tp={self.tp}, ep={self.ep})"

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.dp * self.tp

    def check_world(self, size: int) -> None:
        """Raise `OptionError` unless `size`, the number of ranks, matches the mesh."""
        if size != self.world:
            raise OptionError(
                f"dp={self.dp} times tp={self.tp} is {self.world} ranks",
                limit=f"there are {size}",
                remedy=f"use {self.world} ranks, or dp={size // self.tp}" if size % self.tp == 0 else "change tp",
                option="dp",
                value=self.dp,
            )

    def place(self, rank: int) -> Place:
        """The index of `rank` on every axis."""
        assert 0 <= rank < self.world
        return Place(dp=rank // self.tp, tp=rank % self.tp, ep=rank)

    def ranks(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The ranks of the group that `rank` belongs to along an axis, itself included, in ascending order."""
        place = self.place(rank)
        if axis == "dp":
            return tuple(range(place.tp, self.world, self.tp))
        if axis == "tp":
            return tuple(range(place.dp * self.tp, (place.dp + 1) * self.tp))
        return tuple(range(self.world))

    def groups(self, world: RankGroup) -> MeshGroups:
        """Make the groups of all axes. Every rank of `world` must call it at the same time.

        The group of an axis that spans all ranks is `world` itself, so that nothing is connected twice. Whoever closes
        the groups must leave `world` open.
        """
        self.check_world(world.size)
        dp, tp, ep = (world.part(self.ranks(axis, world.rank)) for axis in ("dp", "tp", "ep"))
        return MeshGroups(dp=dp, tp=tp, ep=ep)
