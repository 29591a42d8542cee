"""The one place where a plain-torch reference finds its fused twin.

A function with a twin is written once, as its reference, and decorated:

    @fused("norm_rope", one_dtype=("x_TD", "weight_D"))
    def rms_norm(x_TD, weight_D, eps): ...

`rms_norm(...)` then runs `antiphon.kernels.fused.norm_rope.rms_norm_fused` for tensors on a CUDA device, and the body
above for all others and inside `no_cuda_kernels()`; `rms_norm.reference(...)` always runs the body. The twin is
imported at its first call, because Triton is only installed with CUDA. Twins take the same arguments:
`tests/kernels/test_dispatch.py` compares them.
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
    """Inside, plain torch runs for tensors on CUDA devices too, as on any other device."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def takes_cuda_kernels(tensor: torch.Tensor) -> bool:
    """Whether kernels that only CUDA has may run on the tensor."""
    return tensor.is_cuda and _allowed.get()


P = ParamSpec("P")
R = TypeVar("R")

LAUNCH_COST = "a launch takes 16 to 45 us of the host instead of 6, so eager steps are host-bound sooner"
"""The cost of a launch through Triton's own call (docs/facts.md)."""

LAUNCH_REMEDY = "use torch 2.11 to 2.14 with the Triton that it brings"


class Kernel(Generic[P, R]):
    """A function on tensors with a plain-torch reference and a fused twin for CUDA devices.

    Its first argument is a tensor, given by position, whose device decides. Where the twin wants one dtype for several
    tensors and they differ, the reference runs on the GPU too, with one warning.
    """

    def __init__(self, reference: Callable[P, R], module: str, one_dtype: tuple[str, ...]) -> None:
        """module: in `antiphon.kernels.fused`. one_dtype: names of positional tensors that must share one dtype."""
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
            remedy="give all of them one dtype",
        )


def fused(module: str, *, one_dtype: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Decorates a reference whose twin is `antiphon.kernels.fused.<module>.<name>_fused`; see the module."""
    return lambda reference: Kernel(reference, module, one_dtype)
