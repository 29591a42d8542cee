"""Times on a CUDA device, by events on the stream that is current."""

from __future__ import annotations

import torch

from antiphon.device.timing import Reading


class CudaTimer:
    """`StepTimer` of one CUDA device; events, so that the host's own time counts only where the device waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: torch.cuda.Event | None = None

    def start(self) -> None:
        self._start = self._record()

    def stop(self) -> Reading:
        assert self._start is not None, "stop without start"
        return Reading(self._start, self._record())

    def elapsed_ms(self, reading: Reading) -> float:
        reading.stop.synchronize()
        return float(reading.start.elapsed_time(reading.stop))

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def cuda_versions() -> dict[str, str]:
    """Of what torch uses on a CUDA device; asking initialises nothing there."""
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return {"nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl)}
