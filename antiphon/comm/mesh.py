"""The mesh: along which axes the ranks of an engine work together, and the group of each axis.

    dp   data parallel      ranks with requests of their own (replicas of the attention)
    tp   tensor parallel    ranks that share the requests and the attention heads of one replica
    ep   expert parallel    ranks that hold a part of the experts each: all of them

A rank is one process with one device. Adjacent ranks share a replica: Mesh(dp=2, tp=2) has

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
    """The place of one rank on every axis."""

    dp: int
    tp: int
    ep: int


class MeshGroups(NamedTuple):
    """One rank's end of the group of every axis."""

    dp: RankGroup
    tp: RankGroup
    ep: RankGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Sizes of the axes; `ep` is dp * tp unless it is given, and may be nothing else.

    Raises `OptionError` for sizes below 1, or experts that are not spread over all ranks.
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
        """Raise `OptionError` unless there are as many ranks as the mesh has places."""
        if size != self.world:
            raise OptionError(
                f"dp={self.dp} times tp={self.tp} makes {self.world} ranks",
                limit=f"there are {size}",
                remedy=f"use {self.world} ranks, or dp={size // self.tp}" if size % self.tp == 0 else "change tp",
                option="dp",
                value=self.dp,
            )

    def place(self, rank: int) -> Place:
        """The place of `rank` on every axis."""
        assert 0 <= rank < self.world
        return Place(dp=rank // self.tp, tp=rank % self.tp, ep=rank)

    def ranks(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The ranks that `rank` works with along an axis, itself among them, in their order on it."""
        place = self.place(rank)
        if axis == "dp":
            return tuple(range(place.tp, self.world, self.tp))
        if axis == "tp":
            return tuple(range(place.dp * self.tp, (place.dp + 1) * self.tp))
        return tuple(range(self.world))

    def groups(self, world: RankGroup) -> MeshGroups:
        """The group of every axis. All ranks of `world` call it at once; whoever closes them leaves `world` open.

        An axis of all ranks is `world` itself, so that nothing is connected twice.
        """
        self.check_world(world.size)
        dp, tp, ep = (world.part(self.ranks(axis, world.rank)) for axis in ("dp", "tp", "ep"))
        return MeshGroups(dp=dp, tp=tp, ep=ep)
