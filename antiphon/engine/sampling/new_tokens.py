"""The token ids that the newest step has chosen: on the device, where the next step reads them, and on the host.

step n        chooses ─► ids_X ─► copy to pinned memory ─► (the host waits for it while step n + 1 runs)
step n + 1    reads ids_X before anything else, and overwrites it at its end
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from antiphon.runtime import Streams

_COPIES = 2  # one that the host reads while the next step writes the other


class NewTokens:
    """A buffer of `size` token ids at a fixed address, which captured steps may hold. The sampler owns it."""

    def __init__(self, size: int, streams: Streams) -> None:
        self._streams = streams
        with torch.inference_mode(False):  # so that it can be used both inside and outside inference mode
            self.ids_X = torch.zeros(size, dtype=torch.int64, device=streams.device)
            self._copies = [
                torch.zeros(size, dtype=torch.int64, device="cpu", pin_memory=streams.owner.pinned_memory)
                for _ in range(_COPIES)
            ]
        self._num_reads = 0

    def read(self, count: int) -> Callable[[], list[int]]:
        """Queue a copy of the first `count` ids. The result waits for it; call it before two more steps have read."""
        copy = self._copies[self._num_reads % _COPIES][:count]
        self._num_reads += 1
        copy.copy_(self.ids_X[:count], non_blocking=True)
        copied = self._streams.record()

        def wait() -> list[int]:
            copied.synchronize()
            token_ids: list[int] = copy.tolist()
            return token_ids

        return wait
