"""Nothing that a lane held outlives the run: activations are large."""

import gc
import weakref
from functools import partial

import pytest

from antiphon.runtime import Pending, finish, run_lanes, switch


class Activations:
    """Stands for a large tensor."""


class Held:
    """Makes activations and knows which of them are alive."""

    def __init__(self) -> None:
        self._refs: dict[str, weakref.ref[Activations]] = {}

    def make(self, name: str) -> Activations:
        made = Activations()
        self._refs[name] = weakref.ref(made)
        return made

    @property
    def names(self) -> set[str]:
        return set(self._refs)

    @property
    def alive(self) -> set[str]:
        return {name for name, ref in self._refs.items() if ref() is not None}


@pytest.fixture
def no_collector():
    """Only reference counts free memory inside the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def returning(kept: object):
    """A function that holds `kept`."""
    return lambda: kept


def run_that_raises(held: Held) -> None:
    """Big objects in an ended, a suspended, a failing and a never started lane, in pendings and in results."""

    def suspended():
        local = held.make("local of the suspended lane")
        sent = Pending(
            returning(held.make("wait of the suspended lane")),
            label="dispatch",
            abandon=returning(held.make("abandon of the suspended lane")),
        )
        finish(Pending.done(held.make("finished result"), label="done"))
        return local, finish(sent)

    def failing():
        local = held.make("local of the failing lane")
        Pending(returning(held.make("wait of the failing lane")), label="combine")
        switch()
        raise OSError(f"failed with {local}")

    def failing_first():
        local = held.make("local of the lane that fails first")
        raise OSError(f"failed with {local}")

    with pytest.raises(OSError, match="failed with"):
        run_lanes([returning(held.make("result of the ended lane")), suspended, failing])
    with pytest.raises(OSError, match="failed with"):
        run_lanes([failing_first, returning(held.make("argument of the lane that never started"))])


def test_a_run_that_raised_keeps_nothing_alive():
    held = Held()
    run_that_raises(held)
    gc.collect()
    assert len(held.names) == 9
    assert held.alive == set()


@pytest.mark.parametrize("num_lanes", [1, 2, 4])
def test_a_run_that_succeeded_keeps_nothing_alive_even_without_the_collector(num_lanes, no_collector):
    held = Held()

    def body(lane, argument):
        local = held.make(f"local {lane}")
        arrived = finish(Pending(returning(held.make(f"arrived {lane}")), label="dispatch"))
        return argument, local, arrived

    functions = [partial(body, lane, held.make(f"argument {lane}")) for lane in range(num_lanes)]
    results = run_lanes(functions)
    assert len(held.alive) == 3 * num_lanes
    del results, functions
    assert held.alive == set()


def test_results_are_not_kept_while_the_other_lanes_still_run(no_collector):
    """A lane's locals go when it ends, not when the run ends."""
    held = Held()
    alive_later = []

    def short():
        local = held.make("local of the short lane")
        switch()
        return str(local)

    def long():
        for _ in range(3):
            switch()
        alive_later.append(held.alive)

    run_lanes([short, long])
    assert alive_later == [set()]


def test_a_finished_pending_lets_its_wait_go(no_collector):
    held = Held()
    sent = Pending(returning(held.make("buffer")), label="dispatch")
    finish(sent)
    assert held.alive == set()
