"""The dispatch helper: which body runs, and that a reference and its fused twin take the same arguments."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

import pytest
import torch

import antiphon.kernels
from antiphon.core.warn_once import warn_once
from antiphon.kernels.dispatch import Kernel, fused


def _all_kernels() -> dict[str, Kernel[..., object]]:
    modules = [import_module(f"antiphon.kernels.{module.name}") for module in iter_modules(antiphon.kernels.__path__)]
    found = {name: value for module in modules for name, value in vars(module).items() if isinstance(value, Kernel)}
    assert len(found) >= 9, "the search for kernels finds too few"
    return found


KERNELS = _all_kernels()


class OnGpu(torch.Tensor):
    """Looks as if it were on a GPU, and computes on the CPU."""

    is_cuda = True


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of fused twins that records what it is given."""
    warn_once.cache_clear()
    module = ModuleType("antiphon.kernels.fused.made_up")
    module.scale_fused = lambda x, y, *, by=1.0: ("fused", by)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    warn_once.cache_clear()


@fused("made_up", one_dtype=("x", "y"))
def scale(x: torch.Tensor, y: torch.Tensor, *, by: float = 1.0) -> tuple[str, float]:
    """What it does."""
    return "reference", by


def numbers(dtype: torch.dtype = torch.float32, *, gpu: bool = False) -> torch.Tensor:
    values = torch.ones(3, dtype=dtype)
    return values.as_subclass(OnGpu) if gpu else values


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_twins_take_the_same_arguments(name: str) -> None:
    pytest.importorskip("triton")
    ours = inspect.signature(KERNELS[name].reference).parameters.values()
    twins = inspect.signature(KERNELS[name].twin).parameters.values()
    # `x_TD` and `x` are one parameter: tensors come by position.
    assert [(p.kind, p.default) for p in ours] == [(p.kind, p.default) for p in twins]
    assert [p.name for p in ours if p.kind is p.KEYWORD_ONLY] == [p.name for p in twins if p.kind is p.KEYWORD_ONLY]


def test_the_device_decides(twins: ModuleType) -> None:
    assert scale(numbers(), numbers(), by=2.0) == ("reference", 2.0)
    assert scale(numbers(gpu=True), numbers(), by=2.0) == ("fused", 2.0)
    assert scale.reference(numbers(gpu=True), numbers(), by=2.0) == ("reference", 2.0)


def test_mixed_dtypes_run_the_reference_and_say_so(twins: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    assert scale(numbers(gpu=True), numbers(torch.bfloat16)) == ("reference", 1.0)
    message = caplog.text
    assert all(word in message for word in ("scale", "bfloat16", "float32"))


def test_the_twin_is_imported_at_its_first_call() -> None:
    missing = fused("not_there")(lambda x: "reference")
    assert missing(numbers()) == "reference"
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        missing(numbers(gpu=True))


def test_it_looks_like_the_function_that_it_is() -> None:
    assert (scale.__name__, scale.__doc__) == ("scale", "What it does.")
    assert list(inspect.signature(scale).parameters) == ["x", "y", "by"]


def test_a_name_that_is_no_parameter_is_found_at_import() -> None:
    with pytest.raises(ValueError, match="weight"):
        fused("made_up", one_dtype=("weight",))(lambda x: None)
