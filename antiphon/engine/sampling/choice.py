"""Turns logits into tokens for all requests of a step together, by the sampling parameters of each.

Greedy requests whose logits nothing modifies cost one argmax. The others are processed in chunks of rows, so that a
large vocabulary does not need much memory. All of it is queued on the device; the only copy to the host is that of the
token ids.

    logits ─► argmax ────────────────────────────────────────► token ids ─► host
          └─► (chunks) biases, min_tokens, penalties ─► draw ──┘

A draw with top_p sorts only the likeliest tokens of a row. If these do not reach top_p, the token id is -1, and the row
is drawn again from all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from itertools import groupby, pairwise

import torch

from antiphon.core.batch import upload
from antiphon.core.sampling import ResolvedParams
from antiphon.engine.sampling.draw import draw, draw_key, draw_ordered, likeliest, scaled
from antiphon.engine.sampling.edits import (
    PenaltyCounts,
    apply_penalties,
    changes_logits,
    find_additions,
    has_penalties,
)
from antiphon.engine.scheduling.request import Request

_NOT_COVERED = -1


class _Method(IntEnum):
    """How to choose the token of a row that is not simply the argmax of the model's logits."""

    GREEDY = auto()  # argmax of the modified logits
    DRAW = auto()  # from all tokens, unsorted
    DRAW_LIKELIEST = auto()  # from the likeliest tokens, sorted; may turn out to need them all
    DRAW_ORDERED = auto()  # from all tokens, sorted


def chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Divide `start:stop` into parts of `size` (of 1 if `size` is 0)."""
    size = max(1, size)
    for first in range(start, stop, size):
        yield slice(first, min(stop, first + size))


def takes_best(request: Request) -> bool:
    """Whether the request's token is simply the argmax of the model's logits."""
    return not request.params.temperature and not changes_logits(request)


class Chooser:
    """Chooses a token for each row of logits, and sets `Request.sampling`.

    num_likeliest: how many tokens of a row are sorted at first. most_elements: size of the largest temporary tensor.
    pin_memory: see `core.batch.upload`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        num_likeliest: int,
        most_elements: int,
        pin_memory: bool,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._num_likeliest = num_likeliest
        self._chunk_size = most_elements // vocab_size
        self._pin_memory = pin_memory
        self._counts: PenaltyCounts | None = None

    def launch(self, logits_NV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """Return one token id per row, on the device [N]; the host does not wait. The logits are not modified.

        The id is -1 where the likeliest tokens were not enough, which can only happen where `may_miss`.
        """
        ids_N = logits_NV.argmax(-1)
        rows = [row for row, request in enumerate(requests) if not takes_best(request)]
        if rows:
            self._choose_rows(rows, requests, logits_NV, ids_N)
        return ids_N

    def may_miss(self, params: ResolvedParams) -> bool:
        """Whether the likeliest tokens may not be enough for a draw, so that the host must look at the result."""
        return self._method(params) is _Method.DRAW_LIKELIEST and params.top_k <= 0

    def choose(self, logits_NV: torch.Tensor, requests: Sequence[Request]) -> tuple[torch.Tensor, list[int]]:
        """Return one token id per row, on the device [N] and on the host, which waits. The logits are not modified."""
        ids_N = self.launch(logits_NV, requests)
        token_ids: list[int] = ids_N.tolist()
        again = [row for row, token_id in enumerate(token_ids) if token_id == _NOT_COVERED]
        if again:
            self._choose_rows(again, requests, logits_NV, ids_N, ordered=True)
            token_ids = ids_N.tolist()
        return ids_N, token_ids

    def _choose_rows(
        self,
        rows: list[int],
        requests: Sequence[Request],
        logits_NV: torch.Tensor,
        ids_N: torch.Tensor,
        *,
        ordered: bool = False,
    ) -> None:
        """Choose the tokens of these rows and write them to `ids_N`. ordered: draw from all tokens, sorted."""
        methods = {row: _Method.DRAW_ORDERED if ordered else self._method(requests[row].params) for row in rows}
        rows = sorted(rows, key=methods.__getitem__)
        settings = self._settings(rows, [requests[row] for row in rows], logits_NV.device)
        start = 0
        for method, group in groupby(rows, key=methods.__getitem__):
            stop = start + len(list(group))
            for part in chunks(start, stop, self._chunk_size):
                of_part = settings.cut(part, self._vocab_size)
                rows_N = of_part.wholes_4N[0]
                changed_NV = self._changed(logits_NV[rows_N], of_part)
                ids_N[rows_N] = self._chosen(method, changed_NV, of_part)
            start = stop

    def _method(self, params: ResolvedParams) -> _Method:
        if params.temperature == 0:
            return _Method.GREEDY
        if params.top_p == 1 and not 0 < params.top_k < self._vocab_size:
            return _Method.DRAW
        few = params.top_k <= self._num_likeliest and 4 * self._num_likeliest <= self._vocab_size
        return _Method.DRAW_LIKELIEST if few else _Method.DRAW_ORDERED

    def _settings(self, rows: list[int], requests: list[Request], device: torch.device) -> _Settings:
        slots: list[int] = [0] * len(rows)
        places: list[int] = []
        amounts: list[int] = []
        if any(has_penalties(request.params) for request in requests):
            if self._counts is None:
                self._counts = PenaltyCounts(self._vocab_size, device)
            slots, places, amounts = self._counts.place(requests)
        additions = find_additions(requests, self._eos_token_ids)
        num_by_row = torch.tensor([stop - start for start, stop in pairwise([0, *additions.ends])])
        row_E = torch.repeat_interleave(torch.arange(len(rows)), num_by_row)
        params = [request.params for request in requests]
        wholes = [
            rows,
            slots,
            [max(p.top_k, 0) for p in params],
            [draw_key(r.seed, r.num_outputs) if r.params.temperature else 0 for r in requests],
        ]
        numbers = [
            [p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.repetition_penalty for p in params],
            [p.frequency_penalty for p in params],
            [p.presence_penalty for p in params],
        ]
        wholes_4N, numbers_6N, added_at_E, added_E, places_E, amounts_E = upload(
            [
                torch.tensor(wholes),
                torch.tensor(numbers, dtype=torch.float64).view(torch.int64),  # one type, so one copy
                row_E * self._vocab_size + additions.token_ids_E,
                additions.values_E.view(torch.int64),
                torch.tensor(places, dtype=torch.int64),
                torch.tensor(amounts, dtype=torch.int64),
            ],
            device,
            pin_memory=self._pin_memory,
        )
        if self._counts is not None and places:
            self._counts.add(places_E, amounts_E)
        return _Settings(
            requests=requests,
            wholes_4N=wholes_4N,
            numbers_6N=numbers_6N.view(torch.float64),
            added_at_E=added_at_E,
            added_E=added_E.view(torch.float64),
            added_ends=additions.ends,
        )

    def _changed(self, logits_NV: torch.Tensor, settings: _Settings) -> torch.Tensor:
        """Apply logit_bias, min_tokens and penalties. The given logits may be overwritten."""
        if len(settings.added_E):
            logits_NV.view(-1).index_add_(0, settings.added_at_E, settings.added_E.to(logits_NV.dtype))
        if self._counts is not None and any(has_penalties(request.params) for request in settings.requests):
            slots_N = settings.wholes_4N[1]
            repetition_N, frequency_N, presence_N = settings.numbers_6N[3:]
            logits_NV = apply_penalties(
                logits_NV,
                self._counts.table_SV[slots_N],
                repetition_N=repetition_N,
                frequency_N=frequency_N,
                presence_N=presence_N,
            )
        return logits_NV

    def _chosen(self, method: _Method, logits_NV: torch.Tensor, settings: _Settings) -> torch.Tensor:
        """Choose token ids [N]; -1 where the likeliest tokens were not enough."""
        if method is _Method.GREEDY:
            return logits_NV.argmax(-1)
        top_k_N, key_N = settings.wholes_4N[2:]
        temperature_N, top_p_N, min_p_N = settings.numbers_6N[:3]
        scaled_NV = scaled(logits_NV, temperature_N)
        if method is _Method.DRAW:
            return draw(scaled_NV, key_N, min_p_N)
        count = self._num_likeliest if method is _Method.DRAW_LIKELIEST else self._vocab_size
        ids_NK = likeliest(logits_NV, count)[1]
        chosen_N, covered_N = draw_ordered(
            scaled_NV.gather(1, ids_NK),
            ids_NK,
            key_N,
            total_N=scaled_NV.exp().sum(-1),
            top_k_N=top_k_N,
            top_p_N=top_p_N,
            min_p_N=min_p_N,
        )
        return torch.where(covered_N, chosen_N, _NOT_COVERED) if method is _Method.DRAW_LIKELIEST else chosen_N


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """The parameters of requests on the device, one column per request."""

    requests: list[Request]
    wholes_4N: torch.Tensor  # int64: row of the logits, slot in the table of penalties, top_k, key of the draw
    numbers_6N: torch.Tensor  # float64: temperature, top_p, min_p, repetition, frequency, presence
    added_at_E: torch.Tensor  # int64, places in the flattened logits of these requests
    added_E: torch.Tensor  # float64
    added_ends: list[int]  # where each request's entries in the previous two end

    def cut(self, part: slice, vocab_size: int) -> _Settings:
        """Return the columns of some of the requests."""
        first, last = [0, *self.added_ends][part.start], self.added_ends[part.stop - 1]
        return _Settings(
            requests=self.requests[part],
            wholes_4N=self.wholes_4N[:, part],
            numbers_6N=self.numbers_6N[:, part],
            added_at_E=self.added_at_E[first:last] - part.start * vocab_size,
            added_E=self.added_E[first:last],
            added_ends=[end - first for end in self.added_ends[part]],
        )
