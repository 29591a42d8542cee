"""Launching compiled kernels without Triton's own call, with the arguments that each version's launcher takes.

A compiled kernel has a `CudaLauncher`, whose C function `launch` queues the kernel on a stream. The arguments
of that function have changed between versions of Triton; `_PROTOCOLS` holds their order for each version.

    "arguments behind"   launch(x, y, z, stream, function, cooperative, pdl, scratch, profile scratch,
                                metadata, launch metadata, enter hook, exit hook, *arguments)
    "arguments packed"   launch(x, y, z, stream, function, cooperative, pdl, metadata, launch metadata,
                                enter hook, exit hook, scratch, profile scratch, annotations, signature, arguments)

The table is verified at run time. Before a kernel is launched directly, Triton's launcher and ours are called with
made-up arguments and a recorder in place of the C function; both must pass it the same arguments. A kernel for which
they differ is launched through Triton, with one warning.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.knobs

from antiphon.core.warn_once import warn_once
from antiphon.kernels.dispatch import LAUNCH_COST, LAUNCH_REMEDY

_TORCH_NAMES = ("_cuda_getDevice", "_cuda_getCurrentRawStream")

Launcher = Callable[..., None]
Queue = Callable[[tuple[int, int], int, tuple[Any, ...]], None]
"""Queues a kernel, given its grid, the stream's driver handle, and all arguments as numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Direct:
    """A compiled kernel that is queued without Triton's own call."""

    queue: Queue
    compiled: Any  # kept alive: from Triton 3.8 on the kernel is unloaded with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The functions of Triton and torch that direct launches need."""

    device: Callable[[], int]  # the current device
    stream: Callable[[int], int]  # the driver handle of a device's current stream
    hooked: Callable[[], bool]  # whether a profiler has hooked launches
    direct: Callable[[Any], Direct | None]  # None if the kernel must go through Triton


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How the launchers of some versions of Triton take their arguments.

    adapt: makes the `Queue` of a compiled kernel from the kernel and the C function of its launcher.
    """

    name: str
    versions: tuple[str, ...]
    parameters: tuple[str, ...]  # of `CudaLauncher.__call__`
    attributes: frozenset[str]  # that a launcher has; an unknown one may be a new requirement
    adapt: Callable[[Any, Launcher], Queue]


def find_protocol(version: str) -> Protocol | None:
    """The protocol of a version of Triton, or None if its launcher is unknown."""
    series = ".".join(version.split(".")[:2])
    return next((protocol for protocol in _PROTOCOLS if series in protocol.versions), None)


def launch_obstacle() -> str:
    """Why direct launches on GPUs are impossible with this Triton and torch; "" if they are possible."""
    version = triton.__version__
    protocol = find_protocol(version)
    if protocol is None:
        known = ", ".join(known for protocol in _PROTOCOLS for known in protocol.versions)
        return f"the launcher of Triton {version} is unknown; only those of {known} are supported"
    try:
        parameters = tuple(inspect.signature(_launcher_class().__call__).parameters)
        runtime = triton.knobs.runtime
        hooks = (runtime.launch_enter_hook.calls, runtime.launch_exit_hook.calls)
        fits = parameters == protocol.parameters and all(isinstance(calls, list) for calls in hooks)
    except (ImportError, AttributeError):
        fits = False
    if not fits:
        return f"the launcher of Triton {version} differs from the one released with this version"
    if missing := [name for name in _TORCH_NAMES if not hasattr(torch._C, name)]:
        return f"torch {torch.__version__} has no {' and no '.join(missing)}"
    return ""


@lru_cache(maxsize=1)
def find_driver() -> Driver | None:
    """The driver for direct launches; None where kernels are interpreted or direct launches are impossible.

    On a GPU, the latter gives one warning.
    """
    if not torch.cuda.is_available() or triton.knobs.runtime.interpret:
        return None
    if obstacle := launch_obstacle():
        fact = f"all kernels are launched by Triton's own call, because {obstacle}"
        warn_once(fact, cost=LAUNCH_COST, remedy=LAUNCH_REMEDY)
        return None
    return _make_driver()


def _make_driver() -> Driver:
    """The driver, provided that there is no `launch_obstacle`."""
    protocol = find_protocol(triton.__version__)
    assert protocol is not None
    runtime = triton.knobs.runtime

    def hooked() -> bool:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)

    def direct(compiled: Any) -> Direct | None:
        if reason := _reason_against(protocol, compiled):
            fact = f"the kernel {compiled.name} is launched by Triton's own call, because {reason}"
            warn_once(fact, cost=LAUNCH_COST, remedy=LAUNCH_REMEDY)
            return None
        return Direct(queue=protocol.adapt(compiled, compiled.run.launch), compiled=compiled)

    return Driver(
        device=torch._C._cuda_getDevice,
        stream=torch._C._cuda_getCurrentRawStream,
        hooked=hooked,
        direct=direct,
    )


def _reason_against(protocol: Protocol, compiled: Any) -> str:
    """Why the kernel must be launched through Triton's own call; "" if it can be launched directly."""
    launcher = compiled.run
    if type(launcher) is not _launcher_class():
        return f"its launcher is a {type(launcher).__name__}"
    if unknown := sorted(vars(launcher).keys() - protocol.attributes):
        return f"its launcher has the unknown attributes {', '.join(unknown)}"
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return "it needs scratch memory"
    if getattr(launcher, "gsan_enabled", False):
        return "Triton's sanitizer instruments it"
    if not all(isinstance(kind, str) and not kind.startswith("tensordesc") for kind in compiled.src.signature.values()):
        return "it takes tensor descriptors or tuples"
    if not _agree(protocol, compiled):
        return f"Triton {triton.__version__} passes its launcher other arguments than known for this version"
    return ""


def _agree(protocol: Protocol, compiled: Any) -> bool:
    """Whether Triton and the protocol pass the launcher's C function the same arguments. Nothing is launched."""
    theirs: list[tuple[Any, ...]] = []
    ours: list[tuple[Any, ...]] = []
    grid, stream, arguments = (3, 5), 7, (11, 13, True)
    recorded = copy.copy(compiled.run)
    recorded.launch = lambda *given: theirs.append(given)
    try:
        recorded(*grid, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
        protocol.adapt(compiled, lambda *given: ours.append(given))(grid, stream, arguments)
    except Exception:  # the launcher takes other arguments
        return False
    return theirs == ours


def _arguments_behind(compiled: Any, launch: Launcher) -> Queue:
    launcher, none = compiled.run, None
    options = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    # Both scratch memories; launch metadata, enter and exit hook.
    head = (*options, none, none, compiled.packed_metadata, none, none, none)

    def queue(grid: tuple[int, int], stream: int, arguments: tuple[Any, ...]) -> None:
        launch(*grid, 1, stream, *head, *arguments)

    return queue


def _arguments_packed(compiled: Any, launch: Launcher) -> Queue:
    launcher, none = compiled.run, None
    options = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    # Launch metadata, enter and exit hook; both scratch memories.
    rest = (none, none, none, none, none, launcher.arg_annotations, launcher.kernel_signature)
    head = (*options, compiled.packed_metadata, *rest)

    def queue(grid: tuple[int, int], stream: int, arguments: tuple[Any, ...]) -> None:
        launch(*grid, 1, stream, *head, arguments)

    return queue


_PLACE = ("self", "gridX", "gridY", "gridZ", "stream", "function")
_SCRATCH = ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align")
_ATTRIBUTES = frozenset(("launch", "num_ctas", "launch_cooperative_grid", "launch_pdl", *_SCRATCH))

_PROTOCOLS = (
    Protocol(
        name="arguments behind",
        versions=("3.6",),
        parameters=(*_PLACE, "args"),
        attributes=_ATTRIBUTES,
        adapt=_arguments_behind,
    ),
    Protocol(
        name="arguments packed",
        versions=("3.7", "3.8", "3.9"),
        parameters=(*_PLACE, "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args"),
        attributes=_ATTRIBUTES | {"arg_annotations", "kernel_signature", "gsan_enabled"},
        adapt=_arguments_packed,
    ),
)


def _launcher_class() -> Any:
    from triton.backends.nvidia.driver import CudaLauncher  # not in every build of Triton

    return CudaLauncher
