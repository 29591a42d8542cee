"""How each Triton's launcher takes arguments: the table, stand-ins for its versions, and the installed one itself."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("triton")

import triton

from antiphon.core.warn_once import warn_once
from antiphon.kernels.fused import direct
from antiphon.kernels.fused.direct import Direct, find_driver, find_protocol, launch_obstacle

ROOT = Path(__file__).resolve().parents[2]
STREAM = 4242


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> Iterator[None]:
    warn_once.cache_clear()
    find_driver.cache_clear()
    yield
    find_driver.cache_clear()


# ---- the table


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "protocol"),
    [
        ("2.11", "3.6.0", "arguments behind"),
        ("2.12", "3.7.0", "arguments packed"),
        ("2.12.1 and 2.13", "3.7.1", "arguments packed"),
        ("2.14", "3.8.0", "arguments packed"),
        ("a nightly build", "3.8.0+git1234abcd", "arguments packed"),
        ("none yet", "3.9.0", "arguments packed"),
    ],
)
def test_what_torch_brings_is_known(torch_version: str, triton_version: str, protocol: str) -> None:
    found = find_protocol(triton_version)
    assert found is not None and found.name == protocol


@pytest.mark.parametrize("version", ["3.5.1", "3.60.0", "3.10.0", "36.0", "4.0"])
def test_other_versions_are_not_trusted(version: str) -> None:
    assert find_protocol(version) is None


# ---- stand-ins for the launchers: what Triton's `__call__` hands to its C function, and what that one accepts

_SETTINGS: dict[str, Any] = {
    "num_ctas": 1,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
    "global_scratch_size": 0,
    "global_scratch_align": 1,
    "profile_scratch_size": 0,
    "profile_scratch_align": 1,
}


class StandIn:
    """Keeps what its C function was given, and refuses what that one cannot parse."""

    own: ClassVar[dict[str, Any]] = {}

    def __init__(self, **changes: Any) -> None:
        self.__dict__.update(_SETTINGS, launch=Parser(self.parse), **(self.own | changes))

    def scratch(self, size: int) -> object:
        return "memory" if size else None

    def parse(self, *given: Any) -> tuple[Any, ...]:
        raise NotImplementedError


class Parser:
    def __init__(self, parse: Callable[..., tuple[Any, ...]]) -> None:
        self._parse = parse
        self.launches: list[tuple[Any, ...]] = []

    def __call__(self, *given: Any) -> None:
        self.launches.append(self._parse(*given))


class Triton36(StandIn):
    """Format "iiiKKppOOOOOO", then one for each argument."""

    def parse(self, *given: Any) -> tuple[Any, ...]:
        head, arguments = given[:13], given[13:]
        assert all(type(value) is int for value in head[:5]) and all(type(value) is bool for value in head[5:7])
        assert [type(value) for value in head[9]] == [int, int, int]
        assert len(arguments) == 4, "function takes another number of arguments"
        return (*head[:7], head[9], head[7:9], head[10:13], arguments)

    def __call__(self, gridX: int, gridY: int, gridZ: int, stream: int, function: int, *args: Any) -> None:
        scratch = self.scratch(self.global_scratch_size), self.scratch(self.profile_scratch_size)
        options = self.launch_cooperative_grid, self.launch_pdl
        self.launch(gridX, gridY, gridZ, stream, function, *options, *scratch, *args)


class Triton37(StandIn):
    """Format "iiiKKpp(iii)OOOOOOy*O"."""

    own: ClassVar[dict[str, Any]] = {"arg_annotations": [object()], "kernel_signature": b"\x01\x04"}

    def parse(self, *given: Any) -> tuple[Any, ...]:
        assert len(given) == 16, "function takes 16 arguments"
        assert all(type(value) is int for value in given[:5]) and all(type(value) is bool for value in given[5:7])
        assert [type(value) for value in given[7]] == [int, int, int]
        assert given[13] is self.arg_annotations and type(given[14]) is bytes and len(given[15]) == 4
        return (*given[:8], given[11:13], given[8:11], tuple(given[15]))

    def __call__(
        self,
        gridX: int,
        gridY: int,
        gridZ: int,
        stream: int,
        function: int,
        kernel_metadata: Any,
        launch_metadata: Any,
        launch_enter_hook: Any,
        launch_exit_hook: Any,
        *args: Any,
    ) -> None:
        behind = (kernel_metadata, launch_metadata, launch_enter_hook, launch_exit_hook)
        scratch = self.scratch(self.global_scratch_size), self.scratch(self.profile_scratch_size)
        options = self.launch_cooperative_grid, self.launch_pdl
        places = (gridX, gridY, gridZ, stream, function)
        self.launch(*places, *options, *behind, *scratch, self.arg_annotations, self.kernel_signature, args)


class Triton38(Triton37):
    own: ClassVar[dict[str, Any]] = {**Triton37.own, "gsan_enabled": False}


LAUNCHERS: dict[str, type[StandIn]] = {
    "3.6.0": Triton36,
    "3.7.0": Triton37,
    "3.7.1": Triton37,
    "3.8.0": Triton38,
    "3.9.0": Triton38,
}


def compiled_by(launcher: StandIn, name: str = "_a_kernel", **signature: Any) -> Any:
    kinds = {"x": "*bf16", "size": "i32", "one": "constexpr", "D": "constexpr"} | signature
    source = SimpleNamespace(signature=kinds)
    return SimpleNamespace(run=launcher, name=name, src=source, function=99, packed_metadata=(4, 1, 2048))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], type[StandIn]]:
    """Let a version of Triton be installed, on a machine with a GPU."""

    def install(version: str) -> type[StandIn]:
        launcher = LAUNCHERS.get(version, Triton38)
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(direct, "_launcher_class", lambda: launcher)
        see_a_gpu(monkeypatch)
        return launcher

    return install


def see_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("version", LAUNCHERS)
@pytest.mark.parametrize("options", [{}, {"launch_cooperative_grid": True, "launch_pdl": True}], ids=["", "options"])
def test_direct_launches_are_those_of_tritons_launcher(
    use: Callable[[str], type[StandIn]], version: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    launcher = use(version)(**options)
    compiled = compiled_by(launcher)
    arguments = (0x7F0000000000, 20, 1, 512)
    launcher(6, 2, 1, STREAM, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    driver = find_driver()
    assert driver is not None
    found = driver.direct(compiled)
    assert isinstance(found, Direct) and len(launcher.launch.launches) == 1, "asking has launched something"
    found.queue((6, 2), STREAM, arguments)
    through_triton, directly = launcher.launch.launches
    assert directly == through_triton
    assert directly[:5] == (6, 2, 1, STREAM, 99) and directly[-1] == arguments
    assert found.compiled is compiled  # from 3.8 on the kernel is unloaded with it
    assert warnings_in(caplog) == []


@pytest.mark.parametrize(
    ("changes", "signature", "reason"),
    [
        ({"global_scratch_size": 128}, {}, "it needs scratch memory"),
        ({"profile_scratch_size": 128}, {}, "it needs scratch memory"),
        ({"gsan_enabled": True}, {}, "Triton's sanitizer instruments it"),
        ({"warm_up": 3}, {}, "its launcher has the unknown attributes warm_up"),
        ({}, {"x": "tensordesc<bf16[64, 64]>"}, "it takes tensor descriptors or tuples"),
        ({}, {"x": ("*bf16", "i32")}, "it takes tensor descriptors or tuples"),
    ],
)
@pytest.mark.parametrize("version", ["3.6.0", "3.8.0"])
def test_a_kernel_that_needs_more_goes_through_triton_and_no_other_one_does(
    use: Callable[[str], type[StandIn]],
    version: str,
    changes: dict[str, Any],
    signature: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make = use(version)
    if version == "3.6.0" and "gsan_enabled" in changes:
        reason = "its launcher has the unknown attributes gsan_enabled"
    driver = find_driver()
    assert driver is not None
    for _ in range(3):  # for other dtypes, say
        assert driver.direct(compiled_by(make(**changes), "_greedy_kernel", **signature)) is None
    assert driver.direct(compiled_by(make())) is not None
    (said,) = warnings_in(caplog)
    assert "_greedy_kernel" in said and reason in said and "16 to 45 us" in said


def test_a_launcher_of_another_kind_goes_through_triton(
    use: Callable[[str], type[StandIn]], caplog: pytest.LogCaptureFixture
) -> None:
    use("3.8.0")
    driver = find_driver()
    assert driver is not None and driver.direct(compiled_by(Triton36())) is None
    (said,) = warnings_in(caplog)
    assert "its launcher is a Triton36" in said


def _swapped(self: Triton38, *given: Any) -> None:
    """Scratch memory in front of the metadata."""
    places, behind, args = given[:5], given[5:9], given[9:]
    self.launch(*places, False, False, None, None, *behind, self.arg_annotations, self.kernel_signature, args)


def _longer(self: Triton38, *given: Any) -> None:
    places, behind, args = given[:5], given[5:9], given[9:]
    more = (None, None, self.arg_annotations, self.kernel_signature, args, "priority")
    self.launch(*places, False, False, *behind, *more)


def _failing(self: Triton38, *given: Any) -> None:
    raise TypeError("missing a required argument: 'priority'")


@pytest.mark.parametrize("call", [_swapped, _longer, _failing])
def test_a_launcher_that_hands_over_something_else_is_found_out(
    use: Callable[[str], type[StandIn]],
    call: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make = use("3.8.0")
    driver = find_driver()
    monkeypatch.setattr(Triton37, "__call__", call)
    assert driver is not None and driver.direct(compiled_by(make())) is None
    (said,) = warnings_in(caplog)
    assert "passes its launcher other arguments than known for this version" in said


# ---- what is said, and where


def test_an_unknown_triton_is_said_once(use: Callable[[str], type[StandIn]], caplog: pytest.LogCaptureFixture) -> None:
    use("3.99.0")
    for _ in range(3):
        assert find_driver() is None
    find_driver.cache_clear()  # as if somebody else asked
    assert find_driver() is None
    (said,) = warnings_in(caplog)
    assert caplog.records[0].name == "antiphon"
    for part in ("Triton 3.99.0 is unknown", "3.6, 3.7, 3.8, 3.9", "16 to 45 us", "host-bound", "use torch 2.11 to"):
        assert part in said


def test_a_known_triton_says_nothing(use: Callable[[str], type[StandIn]], caplog: pytest.LogCaptureFixture) -> None:
    use("3.8.0")
    assert find_driver() is not None
    assert warnings_in(caplog) == []


def test_nothing_is_said_without_a_gpu_or_in_the_interpreter(
    use: Callable[[str], type[StandIn]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use("3.99.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert find_driver() is None
    find_driver.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_driver() is None
    assert warnings_in(caplog) == []


def test_a_known_version_with_another_launcher_is_an_obstacle(
    use: Callable[[str], type[StandIn]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use("3.7.1")
    assert launch_obstacle() == ""
    monkeypatch.setattr(direct, "_launcher_class", lambda: Triton36)
    assert "differs from the one released with this version" in launch_obstacle()

    def absent() -> Any:
        raise ImportError("No module named 'triton.backends.nvidia'")

    monkeypatch.setattr(direct, "_launcher_class", absent)
    assert "differs from the one released with this version" in launch_obstacle()


def test_a_profiler_that_triton_calls_otherwise_is_an_obstacle(
    use: Callable[[str], type[StandIn]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use("3.7.1")
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", None)
    assert "differs from the one released with this version" in launch_obstacle()


def test_a_torch_without_its_stream_is_an_obstacle(
    use: Callable[[str], type[StandIn]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use("3.6.0")
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    assert launch_obstacle() == f"torch {torch.__version__} has no _cuda_getCurrentRawStream"


# ---- the installed Triton


def test_the_installed_triton_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new version fails here before it makes every launch slow."""
    see_a_gpu(monkeypatch)
    assert launch_obstacle() == ""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself is used (test_launch.py)")
def test_the_installed_launcher_gets_the_same_from_triton_and_directly(tmp_path: Path) -> None:
    """Its compiler, its launcher in C and all that lies between, over a driver that writes down what is launched."""
    assert shutil.which(os.environ.get("CC", "cc")), "Triton compiles its launcher: install a C compiler"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.launcher_checks", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["obstacle"] == "" and report["has_driver"]
    assert len(report["kernels"]) >= 9
    for name, found in report["kernels"].items():
        assert found["through_triton"] == [1, 0, 0], (name, done.stderr)
        through_triton, *directly = found["launches"]
        assert through_triton.count("\n") == 1 and f"stream {report['stream']} " in through_triton, name
        assert directly == [through_triton] * 2, name
