"""The slab protocol under the checker: real processes, and the CUDA media over a fake driver that moves nothing."""

from __future__ import annotations

import random
import re
import time

import pytest

from tests.comm.protocol_checks import FIRST_HANDLE, MEDIA, Layers, protocol_world, run_layers
from tests.comm.protocol_mutations import MUTATIONS, Mutation
from tests.support.happens_before import check
from tests.support.protocol_log import Action, LoggedEvent
from tests.support.ranks import run_ranks


def changing_layers(size: int, num_layers: tuple[int, ...], *, seed: int) -> Layers:
    """Sizes that grow and shrink, ranks without tokens, and a layer without any; one lane per entry of `num_layers`."""
    sizes = random.Random(seed)
    layers = [[[sizes.choice([0, 1, sizes.randrange(64)]) for _ in range(size)] for _ in range(n)] for n in num_layers]
    layers[0][1] = [0] * size
    return layers


def accesses(logs: list[list[LoggedEvent]]) -> set[tuple[str, Action]]:
    """The kinds of operations in the logs. A log that lacks one of them proves nothing."""
    return {(event.operation, event.action) for log in logs for event in log}


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
def test_logs_of_real_processes_are_clean(size: int) -> None:
    layers = changing_layers(size, (9, 14), seed=size)
    logs = run_ranks("tests.comm.protocol_checks:logs_of_layers", size, "shared-memory", layers, timeout_s=20)
    assert check(logs) == []
    assert [sum(event.operation == "pack" for event in log) for log in logs] == [
        sum(counts[rank] > 0 for lane in layers for counts in lane) for rank in range(size)
    ]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("num_layers", [(12,), (10, 10), (7, 15), (4, 9, 6)], ids=lambda n: f"{len(n)} lanes")
@pytest.mark.parametrize("name", MEDIA)
def test_media_are_clean(name: str, num_layers: tuple[int, ...], size: int) -> None:
    with protocol_world(name, size=size, num_lanes=len(num_layers)) as world:
        world.run(changing_layers(size, num_layers, seed=1))
        assert check(world.logs()) == []
        moved = {"put"} if name != "host-staged" else {"upload", "download"}
        assert {operation for operation, _ in accesses(world.logs())} >= moved | {"pack", "experts", "local sum"}
        flags = {action for _, action in accesses(world.logs())}
        assert flags >= {Action.SET, Action.WAIT, Action.CLEAR}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.change.__name__}-{m.medium}")
def test_broken_protocols_are_found(mutation: Mutation, size: int) -> None:
    layers = [[[3, 5, 0, 2], [0, 6, 7, 1], [2, 2, 0, 9], [7, 0, 4, 4]], [[4, 4, 4, 4], [1, 9, 3, 0], [5, 0, 5, 2]]]
    with protocol_world(mutation.medium, size=size, num_lanes=2) as world:
        mutation.change(world)
        world.run([[counts[:size] for counts in lane] for lane in layers])
        problems = check(world.logs())
    for pattern in mutation.found:
        assert any(re.search(pattern, problem) for problem in problems), "\n".join([pattern, *problems])


@pytest.mark.parametrize("name", ["copy-engine", "host-staged"])
def test_the_log_is_what_the_driver_was_given(name: str) -> None:
    with protocol_world(name, size=2, num_lanes=2) as world:
        world.run(changing_layers(2, (5, 8), seed=4))
        streams = {"compute": FIRST_HANDLE, "comm": FIRST_HANDLE + 1, "up": FIRST_HANDLE + 1, "down": FIRST_HANDLE + 2}
        logged: list[tuple[object, ...]] = []
        for event in (event for log in world.logs() for event in log):
            if event.operation in ("put", "upload", "download") and event.action is Action.WRITE:
                logged.append(("copy", event.stop - event.start, streams[event.stream]))
            elif event.action in (Action.SET, Action.CLEAR, Action.WAIT):
                kind = "wait" if event.action is Action.WAIT else "write"
                logged.append((kind, int(event.action is not Action.CLEAR), streams[event.stream]))
        given = [
            (call[0], call[3], call[4]) if call[0] == "copy" else (call[0], call[2], call[3])
            for call in world.driver.calls
            if call[0] == "copy" or not world.is_watch_word(call[1])
        ]
    assert logged == given
    assert {call[0] for call in given} == {"copy", "write", "wait"}


@pytest.mark.parametrize("size", [2, 4])
def test_a_replay_is_what_was_queued_one_by_one(size: int) -> None:
    """Logs only see call-by-call queuing. Slabs of several chunks of different lengths; two layouts take turns."""
    with protocol_world("host-staged", size=size, num_lanes=1, recorded=False) as world:
        transport = world.transports[size - 1]
        seen: dict[tuple[int, ...], list[list[list[tuple[object, ...]]]]] = {}
        for _ in range(5):
            for counts in ((40, 50, 7, 33)[:size], (61, 3, 0, 20)[:size]):
                start = len(world.driver.calls)
                run_layers(transport, [[counts]])
                calls = [c for c in world.driver.calls[start:] if not world.is_watch_word(c[1])]
                by_stream = [[c for c in calls if c[-1] == stream] for stream in sorted({c[-1] for c in calls})]
                seen.setdefault(counts, []).append(by_stream)
        assert world.driver.num_replays == 2 * 2 * 2 * 3  # streams, phases, layouts, uses after the second
    for uses in seen.values():
        assert len(uses[0]) == 2, "one stream up, one down"
        assert all(len([call for call in calls if call[0] == "copy"]) > 4 for calls in uses[0])
        assert all(use == uses[0] for use in uses[1:])


def test_slabs_travel_in_several_chunks_in_these_tests() -> None:
    with protocol_world("host-staged", size=2, num_lanes=1) as world:
        world.run([[[40, 50], [3, 0]]])
        assert any("flag 3 " in event.place for log in world.logs() for event in log)


def test_a_check_is_fast() -> None:
    """2 lanes, 50 layers and 4 ranks make over 25,000 events."""
    with protocol_world("host-staged", size=4, num_lanes=2) as world:
        world.run(changing_layers(4, (50, 50), seed=5))
        assert sum(map(len, world.logs())) > 25_000
        begin = time.process_time()
        assert check(world.logs()) == []
        assert time.process_time() - begin < 5
