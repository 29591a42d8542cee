"""A captured step of one rank, as the graph that CUDA makes of it: operations, and nothing but the order of its edges.

    graph = Graph(events, rounds)                   # what `MailboxLog` logged while the step was captured
    log.events += graph.replay(log.rounds)          # a replay, stream by stream
    order = graph.legal_order(random.Random(1))     # one of the orders in which CUDA may run a replay
    finishes([[order, ...] for every rank])         # whether the ranks' replays end

CUDA runs a graph with as much concurrency as it likes. It may run all of it on one stream, in any order that the edges
allow, so a step must end in each of these orders.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import count

from tests.support.protocol_log import Action, LoggedEvent

_COMPUTE = "compute"


class Graph:
    """The operations of one capture, in the order in which they were queued, and the edges between them.

    rounds: the rounds of every lane when the capture began. A batch of stream memory operations is one node of CUDA's
    graph and several here, so there are more legal orders here.
    """

    def __init__(self, events: Sequence[LoggedEvent], rounds: dict[int, int]) -> None:
        self.events = list(events)
        self._rounds = dict(rounds)
        self._before: list[set[int]] = []
        last: dict[str, int] = {}
        recorded: dict[str, int] = {}
        for number, event in enumerate(self.events):
            before = {last[event.stream]} if event.stream in last else set()
            if event.action is Action.RECORD:
                recorded[event.place] = number
            elif event.action is Action.AWAIT:
                assert event.place in recorded, f"{event.place} was recorded outside the capture"
                before.add(recorded[event.place])
            assert before or event.stream == _COMPUTE, f"stream {event.stream} was not forked from the compute stream"
            self._before.append(before)
            last[event.stream] = number
        left = set(range(len(self.events))) - self._reached(last[_COMPUTE])
        streams = {self.events[number].stream for number in left}
        assert not streams, f"work on {streams} was not joined"

    def _reached(self, number: int) -> set[int]:
        """The operations that must have run when this one has."""
        reached, new = {number}, [number]
        while new:
            for before in self._before[new.pop()] - reached:
                reached.add(before)
                new.append(before)
        return reached

    def replay(self, rounds: dict[int, int]) -> list[LoggedEvent]:
        """The operations of one replay, whose events are its own. rounds: of every lane so far; they are moved on."""
        name = f"replay after rounds {sorted(rounds.items())}"
        base = dict(rounds)
        replayed = []
        for event in self.events:
            if event.lane < 0:
                replayed.append(event._replace(place=f"{event.place} of the {name}"))
                continue
            number = event.round - self._rounds.get(event.lane, 0) + base.get(event.lane, 0)
            rounds[event.lane] = max(rounds.get(event.lane, 0), number)
            replayed.append(event._replace(round=number))
        return replayed

    def legal_order(self, choice: random.Random) -> list[LoggedEvent]:
        """All operations in a random order that the edges allow."""
        left = [len(before) for before in self._before]
        after: dict[int, list[int]] = defaultdict(list)
        for number, before in enumerate(self._before):
            for earlier in before:
                after[earlier].append(number)
        ready = [number for number, num_left in enumerate(left) if num_left == 0]
        order = []
        while ready:
            place = choice.randrange(len(ready))
            ready[place], ready[-1] = ready[-1], ready[place]
            number = ready.pop()
            order.append(self.events[number])
            for later in after[number]:
                left[later] -= 1
                if left[later] == 0:
                    ready.append(later)
        assert len(order) == len(self.events)
        return order


def finishes(programs: Sequence[Sequence[LoggedEvent]]) -> bool:
    """Whether ranks that each run one operation after the other come to their ends. Flags are words, as on a device."""
    flags: dict[str, int] = defaultdict(int)
    places = [0] * len(programs)
    for _ in count():
        moved = False
        for rank, program in enumerate(programs):
            while places[rank] < len(program):
                event = program[places[rank]]
                if event.action is Action.WAIT and not flags[event.place]:
                    break
                if event.action is Action.SET:
                    assert not flags[event.place], f"{event.place} is set twice"
                    flags[event.place] = 1
                elif event.action is Action.CLEAR:
                    flags[event.place] = 0
                places[rank] += 1
                moved = True
        if not moved:
            break
    return all(place == len(program) for place, program in zip(places, programs, strict=True))
