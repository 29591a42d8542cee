"""The mesh: sizes that fit, who is where, and the group of every axis."""

from __future__ import annotations

import pytest

from antiphon.comm import Mesh, OptionError, RankGroup
from tests.support.errors import raises
from tests.support.ranks import run_ranks


def test_experts_are_spread_over_all_ranks() -> None:
    assert (Mesh(dp=2, tp=4).ep, Mesh(dp=2, tp=4, ep=8).world) == (8, 8)
    with raises(OptionError, "dp=2", "tp=4", option="ep", value=2, remedy="ep=8"):
        Mesh(dp=2, tp=4, ep=2)


@pytest.mark.parametrize("axis", ["dp", "tp"])
def test_axes_have_a_size(axis: str) -> None:
    with raises(OptionError, option=axis, value=0):
        Mesh(**{axis: 0})


def test_the_world_must_fit() -> None:
    Mesh(dp=2, tp=2).check_world(4)
    with raises(OptionError, "there are 6", option="dp", value=2, remedy="dp=3"):
        Mesh(dp=2, tp=2).check_world(6)
    with raises(OptionError, "there are 3", option="dp", remedy="tp"):
        Mesh(dp=2, tp=2).check_world(3)


def test_places_and_ranks() -> None:
    mesh = Mesh(dp=3, tp=2)
    assert [tuple(mesh.place(rank)) for rank in range(6)] == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 2),
        (1, 1, 3),
        (2, 0, 4),
        (2, 1, 5),
    ]
    assert mesh.ranks("dp", 3) == (1, 3, 5)
    assert mesh.ranks("tp", 3) == (2, 3)
    assert mesh.ranks("ep", 3) == (0, 1, 2, 3, 4, 5)
    for axis in ("dp", "tp", "ep"):
        for rank in range(6):
            assert mesh.ranks(axis, rank)[getattr(mesh.place(rank), axis)] == rank


def test_a_mesh_says_its_axes() -> None:
    assert repr(Mesh(dp=2, tp=4)) == "Mesh(dp=2, tp=4, ep=8)"
    assert Mesh(dp=4) == Mesh(dp=4, tp=1, ep=4)


def test_one_rank_alone() -> None:
    world = RankGroup(rank=0, size=1)
    assert all(group is world for group in Mesh().groups(world))


@pytest.mark.processes
def test_groups_of_two_by_two() -> None:
    for rank, found in enumerate(run_ranks("tests.comm.mesh_checks:gathered_by_axis", 4, 2, 2, timeout_s=20)):
        dp, tp = divmod(rank, 2)
        columns, rows = [tp, tp + 2], [2 * dp, 2 * dp + 1]
        assert found == {
            "dp": [dp, *columns],
            "dp objects": columns,
            "tp": [tp, *rows],
            "tp objects": rows,
            "ep": [rank, 0, 1, 2, 3],
            "ep objects": [0, 1, 2, 3],
        }


@pytest.mark.processes
def test_without_tensor_parallelism_all_ranks_are_one_axis() -> None:
    for rank, found in enumerate(run_ranks("tests.comm.mesh_checks:gathered_by_axis", 2, 2, 1, timeout_s=20)):
        assert found["dp"] == found["ep"] == [rank, 0, 1]
        assert found["tp"] == [0, rank]
