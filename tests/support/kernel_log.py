"""The kernels of `one-sided` and `host-staged` in a log of the slab protocol: what they are meant to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch

from antiphon.comm.slab.mailbox import CommStreams, Exchange, Mailbox, Phase
from antiphon.kernels.slices import slice_bytes
from tests.support.protocol_log import Action, MailboxLog

_COMPUTE, _SENDERS, _RECEIVERS = "compute", -1, -2  # the latter in place of a stream's handle: programs of a kernel
_NUM_PROGRAMS = 3


def log_kernels(mailbox: Mailbox, log: MailboxLog, rank: int) -> None:
    """Log what the mailbox's kernels do, if it has any. rank: of the mailbox."""
    if isinstance(mailbox, _PuttingMailbox):
        mailbox.puts = _LoggedPuts(mailbox.puts, log, mailbox, rank)
    elif isinstance(mailbox, _ExchangingMailbox):
        mailbox.kernels = LoggedHostKernels(mailbox.kernels, log, mailbox, rank)


@runtime_checkable
class _PuttingMailbox(Protocol):
    """What the mailbox has whose kernels put slabs."""

    puts: Any
    _bases: list[int]

    def _epoch_flag(self, lane: int, phase: Phase, source: int) -> int: ...


class _LoggedPuts:
    """Logs what the kernels of `one-sided` do on the compute stream.

    Their flags are epochs, which nobody clears. An epoch that was seen counts as cleared, because the next one differs.
    """

    def __init__(self, inner: Any, log: MailboxLog, mailbox: _PuttingMailbox, rank: int) -> None:
        self._inner = inner
        self._log = log
        self._mailbox = mailbox
        self._rank = rank

    def put(self, exchange: Exchange, target: int, flag: int) -> None:
        self._inner.put(exchange, target, flag)
        bases = self._mailbox._bases
        for put in exchange.puts:
            source, num_bytes = put.source.data_ptr(), put.source.numel()
            self._log.copied(exchange, "put", bases[put.peer] + target, source, num_bytes)
        for put in exchange.puts:
            self._log.flag(Action.SET, exchange, "signal", bases[put.peer] + flag)

    def wait(self, exchange: Exchange, code: int) -> None:
        self._inner.wait(exchange, code)
        for action in (Action.WAIT, Action.CLEAR):
            for arrival in exchange.arrivals:
                flag = self._mailbox._epoch_flag(exchange.lane, exchange.phase, arrival.peer)
                self._log.flag(action, exchange, "wait", self._mailbox._bases[self._rank] + flag)


@runtime_checkable
class _ExchangingMailbox(Protocol):
    """What the mailbox has whose kernels exchange slabs through host memory."""

    kernels: Any
    streams: CommStreams
    num_epochs: int
    _bases: list[int]


class LoggedHostKernels:
    """Logs what the kernels of `host-staged` do. Epochs count as cleared when they were seen, as above.

    Senders and receivers of one kernel run side by side, so each is logged as a stream that leaves the compute stream
    and joins it again. In a captured step the receivers come after the senders: programs of one kernel run together,
    while the branches of a graph may run one after the other. Tests replace parts to break it.
    """

    flag_first = False

    def __init__(self, inner: Any, log: MailboxLog, mailbox: _ExchangingMailbox, rank: int) -> None:
        self._inner = inner
        self._log = log
        self._mailbox = mailbox
        self._rank = rank
        self._num_kernels = 0
        log.name_programs({_SENDERS: "senders", _RECEIVERS: "receivers"})

    def exchange(self, exchange: Exchange, box: torch.Tensor, **places: int) -> None:
        self._inner.exchange(exchange, box, **places)
        self._num_kernels += 1
        begin, sent, received = (f"{point} of kernel {self._num_kernels}" for point in ("begin", "sent", "received"))
        self._log.passed(Action.RECORD, begin, _COMPUTE)
        self._log.passed(Action.AWAIT, begin, "senders")
        self.send(exchange, **places)
        self._log.passed(Action.RECORD, sent, "senders")
        self._log.passed(Action.AWAIT, sent if self._mailbox.streams.capturing else begin, "receivers")
        self.receive(exchange, box, **places)
        self._log.passed(Action.RECORD, received, "receivers")
        for event in (sent, received):
            self._log.passed(Action.AWAIT, event, _COMPUTE)

    def send(self, exchange: Exchange, *, target: int, target_step: int, flag: int, code: int) -> None:
        base = self._mailbox._bases[self._rank] + target
        for number, start, num_bytes in self._slices(exchange):
            if self.flag_first:
                self.set_flags(exchange, flag, number)
            for copy, put in enumerate(exchange.puts):
                if not (exchange.same_source and copy):
                    out, source = base + put.peer * target_step + start, put.source.data_ptr() + start
                    self._log.copied(exchange, "upload", out, source, num_bytes, _SENDERS)
            if not self.flag_first:
                self.set_flags(exchange, flag, number)

    def receive(
        self, exchange: Exchange, box: torch.Tensor, *, target: int, target_step: int, flag: int, code: int
    ) -> None:
        for number, start, num_bytes in self._slices(exchange):
            for arrival in exchange.arrivals:
                self.flag_seen(exchange, arrival.peer, flag, number)
                held = self._mailbox._bases[arrival.peer] + target + self._rank * target_step + start
                into = box.data_ptr() + arrival.offset + start
                self._log.copied(exchange, "download", into, held, num_bytes, _RECEIVERS)

    def flag_seen(self, exchange: Exchange, source: int, flag: int, number: int) -> None:
        for action in (Action.WAIT, Action.CLEAR):
            self._flag(action, exchange, self._rank, source, flag, number, _RECEIVERS)

    def set_flags(self, exchange: Exchange, flag: int, number: int) -> None:
        for put in exchange.puts:
            self._flag(Action.SET, exchange, put.peer, self._rank, flag, number, _SENDERS)

    def _slices(self, exchange: Exchange) -> Iterable[tuple[int, int, int]]:
        """The number, the start and the bytes of every slice."""
        total = exchange.slab_bytes
        size = slice_bytes(total, len(exchange.puts), _NUM_PROGRAMS)
        for number, start in enumerate(range(0, total, size)):
            yield number, start, min(size, total - start)

    def _flag(
        self, action: Action, exchange: Exchange, reader: int, source: int, flag: int, number: int, programs: int
    ) -> None:
        address = self._mailbox._bases[reader] + flag + 4 * (source * self._mailbox.num_epochs + number)
        operation = "signal" if action is Action.SET else "wait"
        self._log.flag(action, exchange, operation, address, programs)
