"""The state of one lane, and the context variable that holds the running lane.

There is no control flow here: `lanes` runs lanes, `traps` switches between them.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from antiphon.device.device import Streams
from antiphon.runtime.hook import Hook
from antiphon.runtime.torch_state import TorchState

if TYPE_CHECKING:
    from greenlet import greenlet

    from antiphon.runtime.pending import Pending


class LaneCancelled(BaseException):
    """Raised in a lane at its switch because another lane failed. Do not catch it; clean up in `finally`."""


@dataclass(slots=True, kw_only=True)
class RunState:
    """What the lanes of one run share."""

    num_lanes: int
    streams: Streams
    hook: Hook
    torch_state: TorchState  # as it was when the run began
    num_pendings: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Lane:
    """One cooperative execution context. `greenlet` is `None` when the run has a single lane."""

    index: int
    run: RunState
    previous: Lane | None
    greenlet: greenlet | None = None
    done: bool = False
    pendings: dict[int, Pending[Any]] = field(default_factory=dict)
    points_passed: dict[Hashable, int] = field(default_factory=dict)

    @property
    def hook(self) -> Hook:
        return self.run.hook

    def add_pending(self, pending: Pending[Any]) -> int:
        number = self.run.num_pendings
        self.run.num_pendings += 1
        self.pendings[number] = pending
        return number


current: ContextVar[Lane | None] = ContextVar("antiphon_lane", default=None)


def running_lane() -> Lane | None:
    """The running lane; `None` outside lanes. A copied context, such as an asyncio task's, may outlive its lane."""
    lane = current.get()
    return None if lane is None or lane.done else lane
