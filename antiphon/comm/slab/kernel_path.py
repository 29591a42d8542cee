"""Small exchanges by kernel, others by copy engines: what the media of GPUs share that do both.

    class Mailbox(KernelMailbox, MailboxOfCopyEngines): ...     # with `put_by_kernel` and `wait_by_kernel`

An exchange goes by kernel if

- all its slabs are equal, and those of all ranks together no larger than `put_bytes`: it is bound by the fixed cost of
  copies, flags and events, which a kernel does not have;
- only one lane runs. In a split step another lane computes meanwhile, and copy engines leave it its SMs.

Both follow from the plan of the step and its numbers of tokens, which all ranks know, so both ends agree. Kernels and
copy engines have flags of their own. Those of the kernels are epochs, which only grow, so a captured step holds no
value that must change.

The device watch costs nothing until a wait lasts long. Then the kernel itself writes the code to the stream's word.
That code belongs to the label, in eager steps too, because a launch is kept for each code.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from importlib.util import find_spec
from typing import ClassVar

from antiphon.comm.group import RankGroup
from antiphon.comm.slab.mailbox import Exchange, Mailbox, Phase
from antiphon.kernels.slices import ALIGNMENT
from antiphon.runtime import num_lanes

logger = logging.getLogger("antiphon.comm")


class KernelMailbox(Mailbox):
    """Gives small exchanges to kernels, and the others to the next class, which copies by copy engines."""

    put_bytes = 0
    """The largest exchange that goes by kernel, the slabs of all ranks together, 0 for none. The same on all ranks."""

    largest_slab: ClassVar[int | None] = None
    """In bytes, where the kernels have a limit of their own."""

    _group: RankGroup
    _by_kernel: dict[tuple[int, Phase], bool]  # for each lane and phase: how its last exchange went

    def use_kernels(self, put_bytes: int) -> None:
        """Set `put_bytes`, on all ranks at the same time. It stays 0 if a rank lacks Triton."""
        found = self._group.all_gather_object(find_spec("triton") is not None)
        if put_bytes and not all(found):
            logger.warning("a rank has no Triton, so small exchanges go by copy engines too")
            return
        self.put_bytes = put_bytes

    def goes_by_kernel(self, exchange: Exchange) -> bool:
        """Whether the exchange would go by kernel if it were put now."""
        slab = exchange.slab_bytes
        fits = 0 < slab * self._group.size <= self.put_bytes and slab % ALIGNMENT == 0
        return fits and (self.largest_slab is None or slab <= self.largest_slab) and num_lanes() == 1

    def put(self, exchange: Exchange) -> None:
        by_kernel = self._by_kernel[exchange.lane, exchange.phase] = self.goes_by_kernel(exchange)
        if by_kernel:
            self.put_by_kernel(exchange)
        else:
            super().put(exchange)  # type: ignore[safe-super]

    def signal(self, exchange: Exchange) -> None:
        """Set the flags, unless a kernel does."""
        if not self._by_kernel.get((exchange.lane, exchange.phase), False):
            super().signal(exchange)  # type: ignore[safe-super]

    def wait(self, exchange: Exchange) -> None:
        if self._by_kernel[exchange.lane, exchange.phase]:
            self.wait_by_kernel(exchange)
        else:
            super().wait(exchange)  # type: ignore[safe-super]

    @abstractmethod
    def put_by_kernel(self, exchange: Exchange) -> None:
        """Queue the kernel that sends the slabs and flags them, on the compute stream."""

    @abstractmethod
    def wait_by_kernel(self, exchange: Exchange) -> None:
        """Hold the compute stream until the peers' slabs have arrived, unless the first kernel does."""


def way_of(exchange: Exchange) -> int:
    """The number of the exchange's lane and phase."""
    return exchange.lane * len(Phase) + exchange.phase
