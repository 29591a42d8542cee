"""The checker on handmade logs: what it must find, and what it must not."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.support.happens_before import check
from tests.support.protocol_log import NAMELESS, Action, LoggedEvent

Log = list[LoggedEvent]


class Rank:
    """Builds the log of one rank. `on` is the stream."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.log: Log = []

    def __call__(
        self,
        action: str,
        place: str,
        start: int = 0,
        stop: int = 0,
        *,
        on: str = "compute",
        round: int = 1,
        lane: int = 0,
        phase: int = 0,
    ) -> Rank:
        stop = stop or (8 if action in ("READ", "WRITE") else 0)
        event = LoggedEvent(
            self.number, on, Action[action], place, start, stop, action.lower(), lane, phase, round, "dispatch"
        )
        self.log.append(event)
        return self


def both() -> tuple[Rank, Rank]:
    return Rank(0), Rank(1)


def problems_of(*ranks: Rank) -> list[str]:
    """The problems of the logs in this order. Every other order must agree on whether there are any."""
    problems = check([rank.log for rank in ranks])
    for logs in itertools.permutations([rank.log for rank in ranks]):
        assert bool(check(logs)) == bool(problems)
    return problems


def expect(ranks: tuple[Rank, ...], *texts: str) -> None:
    problems = problems_of(*ranks)
    assert len(problems) == len(texts), problems
    for text in texts:
        assert any(text in problem for problem in problems), (text, problems)


def send(source: Rank, target: Rank, flag: str = "F", *, on: str = "compute", round: int = 1) -> None:
    source("SET", flag, on=on, round=round)
    target("WAIT", flag, on=on, round=round)("CLEAR", flag, on=on, round=round)


def test_nothing_has_no_problems() -> None:
    assert check([]) == []
    assert check([[], []]) == []


# ---- order of accesses


def test_a_flag_orders() -> None:
    a, b = both()
    a("WRITE", "M")
    send(a, b)
    b("READ", "M")
    expect((a, b))


@pytest.mark.parametrize(("first", "second"), [("WRITE", "WRITE"), ("WRITE", "READ"), ("READ", "WRITE")])
def test_two_ranks_without_a_flag_race(first: str, second: str) -> None:
    a, b = both()
    a("WRITE", "M")
    send(a, b)
    a(first, "M")
    b(second, "M")
    race = [problem for problem in problems_of(a, b) if problem.endswith("in no order")]
    assert len(race) == 1 and "M, bytes 0 to 8" in race[0] and "rank 0" in race[0] and "rank 1" in race[0]


def test_reads_do_not_race() -> None:
    a, b = both()
    a("WRITE", "M")
    send(a, b)
    a("READ", "M")
    b("READ", "M")
    expect((a, b))


def test_only_common_bytes_race() -> None:
    a, b = both()
    a("WRITE", "M", 0, 8)
    b("WRITE", "M", 8, 16)
    expect((a, b))
    b("WRITE", "M", 7, 9)
    expect((a, b), "M, bytes 7 to 8")


def test_an_old_write_is_remembered_where_newer_ones_do_not_cover_it() -> None:
    a, b = both()
    a("WRITE", "M", 0, 100)
    a("WRITE", "M", 20, 60)
    b("WRITE", "M", 70, 80)
    expect((a, b), "bytes 70 to 80")


def test_an_old_read_is_remembered_beside_newer_ones() -> None:
    a, b = both()
    a("WRITE", "M", 0, 100)("READ", "M", 0, 100)
    send(a, b)
    b("READ", "M", 0, 50)("READ", "M", 50, 100)
    a("WRITE", "M", 40, 60, round=2)
    races = [problem for problem in check([b.log, a.log]) if "in no order" in problem]
    assert len(races) == 1 and "(and 1 more like it)" in races[0], races  # two reads by the same operation


def test_order_passes_through_a_third_rank() -> None:
    a, b, c = Rank(0), Rank(1), Rank(2)
    a("WRITE", "M")
    send(a, b, "F")
    send(b, c, "G")
    c("READ", "M")("WRITE", "M")
    expect((a, b, c))


def test_streams_of_a_rank_need_an_event() -> None:
    a = Rank(0)
    a("WRITE", "M")("READ", "M", on="comm")
    expect((a,), "in no order")
    b = Rank(0)
    b("WRITE", "M")("RECORD", "event 1")("AWAIT", "event 1", on="comm")("READ", "M", on="comm")
    expect((b,))


def test_an_event_orders_only_what_was_before_it() -> None:
    a = Rank(0)
    a("RECORD", "event 1")("WRITE", "M")("AWAIT", "event 1", on="comm")("READ", "M", on="comm")
    expect((a,), "in no order")


def test_events_of_two_ranks_are_not_the_same() -> None:
    a, b = both()
    a("WRITE", "M")("RECORD", "event 1")
    b("RECORD", "event 1")("AWAIT", "event 1", on="comm")("READ", "M", on="comm")
    expect((a, b), "in no order")


def test_a_wait_is_for_its_own_set_only() -> None:
    """The first wait implies nothing about what came after the first set."""
    a, b = both()
    a("SET", "F")
    a("WRITE", "M")
    b("WAIT", "F")("CLEAR", "F")("READ", "M")
    expect((a, b), "in no order")


# ---- flags


def test_flags_may_be_used_again_and_again() -> None:
    a, b = both()
    for round in range(1, 6):
        a("WRITE", "M", round=round)
        send(a, b, "F", round=round)
        b("READ", "M", round=round)
        send(b, a, "G", round=round)
    expect((a, b))


def test_a_wait_without_a_set() -> None:
    a, b = both()
    b("WAIT", "F")
    expect((a, b), "waits forever: nobody sets it")


def test_waits_in_a_ring() -> None:
    a, b = both()
    a("WAIT", "G")("CLEAR", "G")("SET", "F")
    b("WAIT", "F")("CLEAR", "F")("SET", "G")
    expect((a, b), "G: the wait of rank 0", "F: the wait of rank 1")


def test_only_the_cause_of_a_hang_is_named() -> None:
    a, b, c = Rank(0), Rank(1), Rank(2)
    a("WAIT", "never")("CLEAR", "never")("SET", "F")
    b("WAIT", "F")("CLEAR", "F")("SET", "G")
    c("WAIT", "G")("CLEAR", "G")
    expect((a, b, c), "never: the wait of rank 0")


def test_an_event_that_nobody_records() -> None:
    a = Rank(0)
    a("AWAIT", "event 9", on="comm")
    expect((a,), "nobody records it")


def test_a_set_that_nobody_waits_for() -> None:
    a, b = both()
    a("SET", "F")
    expect((a, b), "nobody waits for it")


def test_a_flag_that_stays_up() -> None:
    a, b = both()
    a("SET", "F")
    b("WAIT", "F")
    expect((a, b), "nobody clears it")


def test_a_flag_set_again_before_it_is_known_to_be_down() -> None:
    a, b = both()
    send(a, b)
    send(a, b)
    expect((a, b), "sets it, not known to be after the previous clear")


def test_a_clear_on_another_stream_than_the_wait() -> None:
    a, b = both()
    a("SET", "F")
    b("WAIT", "F")("CLEAR", "F", on="down")
    expect((a, b), "clears it, not known to be after its wait")


def test_a_second_wait_before_the_clear_may_see_the_first_set() -> None:
    a, b = both()
    a("SET", "F")
    b("WAIT", "F")
    send(b, a, "G")
    a("SET", "F")
    b("WAIT", "F")("CLEAR", "F")("CLEAR", "F")
    expect(
        (a, b),
        "sets it, not known to be after the previous clear",
        "waits for it, not known to be after the previous clear",
    )


# ---- rounds


@pytest.mark.parametrize("other", [{"round": 1}, {"lane": 1}, {"phase": 1}], ids=str)
def test_bytes_of_another_exchange_are_not_what_should_be_read(other: dict[str, int]) -> None:
    a = Rank(0)
    a("WRITE", "M", **{"round": 2, **other})("READ", "M", round=2)
    expect((a,), "M, byte 0: the read of rank 0")


def test_every_byte_must_be_written() -> None:
    a = Rank(0)
    a("WRITE", "M", 0, 4)("WRITE", "M", 5, 8)("READ", "M", 0, 8)
    expect((a,), "M, byte 4: the read of rank 0")
    b = Rank(0)
    b("WRITE", "M", 4, 8)("WRITE", "M", 0, 5)("READ", "M", 0, 8)
    expect((b,))


def test_memory_without_a_name() -> None:
    a = Rank(0)
    a("WRITE", f"{NAMELESS}, 0x123")
    expect((a,), "8 bytes of memory without a name, 0x123")


def test_similar_problems_are_reported_once() -> None:
    a, b = both()
    a("WRITE", "M", 0, 32)
    for start in range(0, 32, 8):
        b("READ", "M", start, start + 8)
    (problem,) = problems_of(a, b)
    assert problem.endswith("in no order (and 3 more like it)")


# ---- against the definition


@pytest.mark.parametrize("seed", range(30))
def test_races_are_those_of_the_transitive_closure(seed: int) -> None:
    """Random programs of three ranks with single-use flags, against reachability in the graph of all events."""
    choice = random.Random(seed)
    ranks = [Rank(number) for number in range(3)]
    place = []
    for number in range(24):
        source, target = choice.sample(ranks, 2)
        if choice.random() < 0.5:
            send(source, target, f"F{number}")
        else:
            begin = choice.randrange(12)
            action = choice.choice(["READ", "WRITE"])
            place.append((source, len(source.log)))
            source(action, "M", begin, begin + 1 + choice.randrange(4))
    races = [problem for problem in check([rank.log for rank in ranks]) if "in no order" in problem]
    assert bool(races) == _has_race(ranks, place)


def _has_race(ranks: list[Rank], places: list[tuple[Rank, int]]) -> bool:
    events = [(rank.number, index) for rank in ranks for index in range(len(rank.log))]
    event_at = {(rank.number, index): event for rank in ranks for index, event in enumerate(rank.log)}
    waits = {event.place: at for at, event in event_at.items() if event.action is Action.WAIT}
    after: dict[tuple[int, int], set[tuple[int, int]]] = {}

    def reach(at: tuple[int, int]) -> set[tuple[int, int]]:
        if at not in after:
            following = [(at[0], at[1] + 1)] if (at[0], at[1] + 1) in event_at else []
            if event_at[at].action is Action.SET:
                following.append(waits[event_at[at].place])
            after[at] = set(following).union(*(reach(other) for other in following))
        return after[at]

    for event in events:
        reach(event)
    accesses = [(rank.number, index) for rank, index in places]
    return any(
        Action.WRITE in (event_at[x].action, event_at[y].action)
        and event_at[x].start < event_at[y].stop
        and event_at[y].start < event_at[x].stop
        and y not in reach(x)
        and x not in reach(y)
        for x, y in itertools.combinations(accesses, 2)
    )
