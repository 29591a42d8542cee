"""A transport that fails at the start: the error names what the machine lacks, if that is the cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from antiphon.comm import Mesh, RankGroup
from antiphon.config.engine_config import EngineConfig
from antiphon.core.errors import OptionError
from antiphon.engine import build
from antiphon.machine.facts import Check, Facts
from antiphon.runtime import CpuStreams
from tests.comm.test_usable import facts
from tests.support.errors import raises

FAILED = Check(ok=False, detail="Operation not permitted")


def make(monkeypatch: pytest.MonkeyPatch, error: Exception, examine: Callable[[], Facts]) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(build, "create_transport", fail)
    monkeypatch.setattr(build, "examine_machine", examine)
    config = EngineConfig(ranks=2, device="cpu", transport="shared-memory").resolve()
    build.make_transport(config, RankGroup(rank=0, size=1), CpuStreams())


def test_what_the_machine_lacks_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("memfd_create", "Operation not permitted", "the driver says no")
    with raises(OptionError, *names, option="transport", value="shared-memory", remedy="Linux") as raised:
        make(monkeypatch, RuntimeError("the driver says no\nand more"), lambda: facts(memfd=FAILED))
    assert isinstance(raised.error.__cause__, RuntimeError)
    assert "and more" not in str(raised.error)


def test_another_cause_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"^a fault of ours$"):
        make(monkeypatch, RuntimeError("a fault of ours"), facts)


def test_an_error_that_has_its_remedy_asks_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def examine() -> Facts:
        raise AssertionError("the machine was examined")

    asked = OptionError("max_tokens=9 is too many", remedy="lower max_tokens", option="max_tokens", value=9)
    with raises(OptionError, option="max_tokens", value=9, remedy="max_tokens") as raised:
        make(monkeypatch, asked, examine)
    assert raised.error is asked


def test_host_memory_is_judged_by_what_this_engine_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def little_memory() -> Facts:
        found = facts()
        return replace(found, host=replace(found.host, memory_available_bytes=1 << 20))

    with raises(OptionError, "1 MiB", option="transport", value="shared-memory"):
        make(monkeypatch, RuntimeError("no memory"), little_memory)


def test_a_mesh_that_the_engine_cannot_run_is_refused_before_anything_is_made() -> None:
    config, alone = EngineConfig(device="cpu").resolve(), RankGroup(rank=0, size=1)
    with raises(OptionError, "tensor-parallel", option="tp", value=2, remedy="dp=2"):
        build.build_engine(config, alone, mesh=Mesh(tp=2))
    with raises(OptionError, "there are 1", option="dp", value=3):
        build.build_engine(config, alone, mesh=Mesh(dp=3))
