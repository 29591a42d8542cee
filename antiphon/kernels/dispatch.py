"""The only place where a plain-torch reference is connected to its fused twin.

A function with a twin is written as its reference and decorated:

    @fused("norm_rope", one_dtype=("x_TD", "weight_D"))
    def rms_norm(x_TD, weight_D, eps): ...

`rms_norm(...)` then runs `antiphon.kernels.fused.norm_rope.rms_norm_fused` for tensors on a CUDA device. For all other
tensors, and inside `no_cuda_kernels()`, it runs the body above; `rms_norm.reference(...)` always does. The twin is
imported at its first call, because Triton is only installed with CUDA. Twins take the same arguments, which
`tests/kernels/test_dispatch.py` checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from antiphon.core.warn_once import warn_once

_allowed: ContextVar[bool] = ContextVar("antiphon_cuda_kernels", default=True)


@contextmanager
def no_cuda_kernels() -> Iterator[None]:
    """A context in which tensors on CUDA devices are computed in plain torch too, as on any other device."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def cuda_kernels_allowed() -> bool:
    """Whether this context is outside `no_cuda_kernels`."""
    return _allowed.get()


def takes_cuda_kernels(tensor: torch.Tensor) -> bool:
    """Whether kernels for CUDA devices only may run on the tensor."""
    return tensor.is_cuda and _allowed.get()


P = ParamSpec("P")
R = TypeVar("R")

LAUNCH_COST = "a launch takes 16 to 45 us of host time instead of 6, so eager steps become host-bound sooner"
"""The cost of a launch through Triton's own call (docs/facts.md)."""

LAUNCH_REMEDY = "use torch 2.11 to 2.14 with the Triton version that comes with it"


class Kernel(Generic[P, R]):
    """A function on tensors with a plain-torch reference and a fused twin for CUDA devices.

    The device of its first argument, a tensor given by position, decides which one runs. Where the twin needs one dtype
    for several tensors and theirs differ, the reference runs on the GPU instead, with one warning.
    """

    def __init__(self, reference: Callable[P, R], module: str, one_dtype: tuple[str, ...]) -> None:
        """module: its name in `antiphon.kernels.fused`. one_dtype: the positional tensors that must share one dtype."""
        names = list(inspect.signature(reference).parameters)
        self.reference = self.__wrapped__ = reference
        self.module = module
        self.__name__ = reference.__name__
        self.__doc__ = reference.__doc__
        self._dtype_places = tuple(map(names.index, one_dtype))
        self._twin: Callable[P, R] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        tensors: tuple[Any, ...] = args
        if not takes_cuda_kernels(tensors[0]):
            return self.reference(*args, **kwargs)
        places = self._dtype_places
        for place in places[1:]:
            if tensors[place].dtype != tensors[places[0]].dtype:
                self._warn_of_reference({tensors[place].dtype for place in places})
                return self.reference(*args, **kwargs)
        return (self._twin or self.twin)(*args, **kwargs)

    @property
    def twin(self) -> Callable[P, R]:
        """The fused function, which needs Triton."""
        if self._twin is None:
            self._twin = getattr(import_module(f"antiphon.kernels.fused.{self.module}"), f"{self.__name__}_fused")
        return self._twin

    def _warn_of_reference(self, dtypes: set[Any]) -> None:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        warn_once(
            f"{self.__name__} runs in plain torch on a GPU, because its tensors are {' and '.join(names)}",
            cost="several launches and passes over memory instead of one",
            remedy="use the same dtype for all of them",
        )


def fused(module: str, *, one_dtype: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Decorate a reference whose twin is `antiphon.kernels.fused.<module>.<name>_fused`; see the module docstring."""
    return lambda reference: Kernel(reference, module, one_dtype)
