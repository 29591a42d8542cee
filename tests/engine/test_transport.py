"""A transport that fails at the start: what the machine lacks is said, if that is why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from antiphon.comm import RankGroup
from antiphon.config.engine_config import EngineConfig
from antiphon.core.errors import OptionError
from antiphon.engine import build
from antiphon.machine.facts import Check, Facts
from antiphon.runtime import CpuStreams
from tests.comm.test_usable import facts

FAILED = Check(ok=False, detail="Operation not permitted")


def make(monkeypatch: pytest.MonkeyPatch, error: Exception, examine: Callable[[], Facts]) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(build, "create_transport", fail)
    monkeypatch.setattr(build, "examine_machine", examine)
    config = EngineConfig(ranks=2, device="cpu", transport="shared-memory").resolve()
    build.make_transport(config, RankGroup(rank=0, size=1), CpuStreams())


def test_what_the_machine_lacks_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        r"transport 'shared-memory' cannot be used on this machine: no shared memory by memfd_create "
        r"\(Operation not permitted\) \(the driver says no\); use Linux"
    )
    with pytest.raises(OptionError, match=said) as caught:
        make(monkeypatch, RuntimeError("the driver says no\nand more"), lambda: facts(memfd=FAILED))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_another_cause_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"^a fault of ours$"):
        make(monkeypatch, RuntimeError("a fault of ours"), facts)


def test_an_error_that_has_its_remedy_asks_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def examine() -> Facts:
        raise AssertionError("the machine was examined")

    with pytest.raises(OptionError, match=r"^lower max_tokens$"):
        make(monkeypatch, OptionError("lower max_tokens"), examine)


def test_host_memory_is_judged_by_what_this_engine_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def little_memory() -> Facts:
        found = facts()
        return replace(found, host=replace(found.host, memory_available_bytes=1 << 20))

    with pytest.raises(OptionError, match=r"needs .* MiB of host memory, 1 MiB are free"):
        make(monkeypatch, RuntimeError("no memory"), little_memory)
