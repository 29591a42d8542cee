"""Steps without prefill at fixed sizes, captured where the device can, each to be replayed by one launch.

    fill the static inputs ─► one launch: embedding, layers in lanes, head, greedy tokens ─► new tokens, hidden states

A step of `b` rows a lane runs the unchanged model over padded micro-batches: rows past the real ones have expert id -1
and length 0. All lanes and comm streams are in one graph, so the overlap is inside. The same function runs eagerly
where nothing can be captured, so that texts do not depend on it.

Shapes: `X` rows of all lanes, one lane after the other, `D` hidden size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from antiphon.comm import RankGroup, Transport
from antiphon.config.graph_sizes import CaptureReport
from antiphon.config.memory import is_out_of_memory
from antiphon.core.batch import Batch
from antiphon.core.errors import OptionError, first_line
from antiphon.core.plan import Plan
from antiphon.device.device import Captured
from antiphon.engine.graphs.static_inputs import LaneInputs, StaticInputs
from antiphon.engine.runner import Runner
from antiphon.engine.sampling.new_tokens import NewTokens
from antiphon.models import CausalLM
from antiphon.runtime import EventKind
from antiphon.splitting import join

logger = logging.getLogger("antiphon.engine")

_MOST_FAILED = 2  # sizes in a row

Size = tuple[int, int]
"""Lanes of a step, and rows of each."""

Ladders = Mapping[int, tuple[int, ...]]
"""Ascending sizes of a lane, by number of lanes."""


class PaddedSteps:
    """The padded steps of one rank. All ranks must call its methods together.

    hidden_XD: the hidden states of the last step, at a fixed address. Overwritten by the next step.
    """

    def __init__(
        self,
        model: CausalLM,
        runner: Runner,
        inputs: StaticInputs,
        new_tokens: NewTokens,
        transport: Transport,
        *,
        max_rows: int,
    ) -> None:
        """max_rows: of all lanes together."""
        self._model = model
        self._runner = runner
        self._inputs = inputs
        self._new_tokens = new_tokens
        self._transport = transport
        self._streams = transport.streams
        self._captured: dict[Size, Captured[None]] = {}
        self._bytes: dict[Size, int] = {}  # that a step sends
        shape = transport.shape
        with torch.inference_mode(False):
            self.hidden_XD = torch.zeros(max_rows, shape.hidden_size, dtype=shape.dtype, device=self._streams.device)

    def capture(
        self, ladders: Ladders, group: RankGroup, *, report: Callable[[int, int], None] = lambda done, of: None
    ) -> CaptureReport:
        """Capture every size, the largest first, which sizes the memory that all share.

        report: called with the number of sizes done and of all. A size that cannot be captured on some rank is captured
        on none, and two in a row end it; `ladders` then says what is left. Raises `OptionError` if a size does not fit
        into the memory of this rank.
        """
        sizes = sorted(
            ((lanes, rows) for lanes, ladder in ladders.items() for rows in ladder),
            key=lambda size: (size[0] * size[1], size),
            reverse=True,
        )
        started, free_before = time.monotonic(), self._streams.owner.memory().free_bytes
        obstacle, num_failed = "", 0
        for done, size in enumerate(sizes):
            report(done, len(sizes))
            self._warm_up(size)
            failed = ""
            try:
                self._capture(size)
            except Exception as error:
                failed = f"{size[0]} lanes of {size[1]} rows could not be captured: {first_line(error)}"
            failures = [text for text in group.all_gather_object(failed) if text]  # before the next one runs anywhere
            if not failures:
                num_failed = 0
                continue
            obstacle, num_failed = failures[0], num_failed + 1
            logger.warning("%s", obstacle)
            self._captured.pop(size, None)
            self._transport.reset()  # nothing of a capture is in flight
            group.clear_order()
            if num_failed == _MOST_FAILED:
                break
        report(len(sizes), len(sizes))
        return CaptureReport(
            num_graphs=len(self._captured),
            time_s=time.monotonic() - started,
            num_bytes=max(0, free_before - self._streams.owner.memory().free_bytes),
            sizes=self.ladders,
            obstacle="" if self._captured else obstacle,
        )

    @property
    def ladders(self) -> Ladders:
        """The sizes that are captured on all ranks."""
        lanes = sorted({lanes for lanes, _ in self._captured})
        return {number: tuple(sorted(rows for lane, rows in self._captured if lane == number)) for number in lanes}

    @torch.inference_mode()
    def fill(self, batch: Batch, plan: Plan, sources: Mapping[int, int]) -> Sequence[int]:
        """Write the inputs of a step of `plan.graph` rows a lane. Returns the row of each request in `hidden_XD`.

        sources: see `StaticInputs.fill`.
        """
        return self._inputs.fill(batch, plan, sources)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> None:
        """Launch the step that was filled. The best token after every row is in the new tokens, at the same index."""
        captured = self._captured.get((plan.num_lanes, plan.graph))
        if captured is None:
            self._step((plan.num_lanes, plan.graph))
        else:
            self._transport.before_replay()
            captured.replay()

    def replayed_bytes(self, plan: Plan) -> int:
        """Bytes that a step sends to other ranks, if it is a replay. Otherwise its events tell, and this is 0."""
        return self._bytes[plan.num_lanes, plan.graph] if self.is_captured(plan) else 0

    def is_captured(self, plan: Plan) -> bool:
        return (plan.num_lanes, plan.graph) in self._captured

    @torch.inference_mode()
    def _capture(self, size: Size) -> None:
        self._captured[size] = self._streams.capture(lambda: self._step(size))

    @torch.inference_mode()
    def _warm_up(self, size: Size) -> None:
        """Run the step with padding only, so that every kernel is compiled and every buffer has its size."""
        lanes, rows = size
        plan = Plan(part_tokens=((0,) * lanes,) * self._transport.group.size, graph=rows, reason="to be captured")
        self._inputs.fill(Batch(rank=0, requests=()), plan, {})
        try:
            with self._runner.listening() as events:
                self._step(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OptionError(
                f"a decode step of {lanes} x {rows} sequences does not fit into the memory that the cache leaves free",
                limit=first_line(error),
                remedy="use smaller cuda_graph_sizes, a lower max_num_seqs, a smaller KV cache, or enforce_eager",
                option="cuda_graph_sizes",
                value=rows,
            ) from error
        self._bytes[size] = sum(event.num_bytes for event in events if event.kind is EventKind.ARRIVED)

    def replay_ms(self, batch: Batch, plan: Plan, *, repeats: int) -> float:
        """Milliseconds of a captured step on this rank, replayed back to back after one more that is not timed."""
        captured = self._captured[plan.num_lanes, plan.graph]
        timer = self._streams.owner.timer()
        with torch.inference_mode():
            self.fill(batch, plan, {})
            self.launch(plan)
            timer.start()
            for _ in range(repeats):
                self._transport.before_replay()
                captured.replay()
            return timer.elapsed_ms(timer.stop()) / repeats

    def _step(self, size: Size) -> None:
        """What is captured: everything between the static inputs and the new tokens."""
        lanes, rows = size
        num_ranks, ids_X = self._transport.group.size, self._new_tokens.ids_X
        inputs = [self._inputs.lane(lane, rows) for lane in range(lanes)]
        parts = [one.micro_batch(lane, _token_ids(one, ids_X), num_ranks) for lane, one in enumerate(inputs)]
        hidden_XD = self.hidden_XD[: lanes * rows]
        hidden_XD.copy_(join(self._runner.run(parts)))
        ids_X[: lanes * rows] = self._model.best_tokens(hidden_XD)


def _token_ids(inputs: LaneInputs, ids_X: torch.Tensor) -> torch.Tensor:
    """The token of every row: a known one, or one that the step before has chosen."""
    return torch.where(inputs.sources_T < 0, inputs.token_ids_T, ids_X[inputs.sources_T])
