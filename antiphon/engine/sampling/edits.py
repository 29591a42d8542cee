"""Modifies logits before a token is chosen: logit_bias, min_tokens and the penalties.

How often tokens were generated is counted on the device, in a table with one row of the vocabulary for every request
with penalties; a step adds only its new tokens. `Request.sampling` holds the slot of the row. When it is dropped, with
the request or before, the row becomes free; if the request needs one again, its tokens are counted anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from antiphon.core.sampling import ResolvedParams
from antiphon.engine.scheduling.request import Request

_IN_PROMPT = 2**24
"""Added to the count of a token that is in the prompt; far above any count of generated tokens."""


@dataclass(slots=True, kw_only=True, weakref_slot=True)
class _Kept:
    """The sampling state of a request, kept in `Request.sampling`."""

    bias: tuple[torch.Tensor, torch.Tensor] | None = None  # token ids (int64) and biases (float64), on the host
    slot: int = 0  # in the table; 0 if it has none
    num_counted: int = 0  # generated tokens that the table counts


def has_penalties(params: ResolvedParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def changes_logits(request: Request) -> bool:
    """Whether anything modifies this request's logits."""
    params = request.params
    return params.logit_bias is not None or request.num_outputs < params.min_tokens or has_penalties(params)


@dataclass(slots=True)
class Additions:
    """Values to add to logits, on the host. The entries of row r are `ends[r - 1]` to `ends[r]`."""

    token_ids_E: torch.Tensor  # int64
    values_E: torch.Tensor  # float64
    ends: list[int]


def find_additions(requests: Sequence[Request], eos_token_ids: frozenset[int]) -> Additions:
    """Collect logit_bias, and -inf for tokens that would end a request before its min_tokens."""
    ids = [torch.empty(0, dtype=torch.int64)]
    values = [torch.empty(0, dtype=torch.float64)]
    ends, end = [], 0
    for request in requests:
        params = request.params
        if params.logit_bias is not None:
            kept = _kept(request)
            if kept.bias is None:
                kept.bias = (
                    torch.tensor(list(params.logit_bias)),
                    torch.tensor(list(params.logit_bias.values()), dtype=torch.float64),
                )
            ids.append(kept.bias[0])
            values.append(kept.bias[1])
            end += len(kept.bias[0])
        if request.num_outputs < params.min_tokens:
            hidden = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids)}
            ids.append(torch.tensor(sorted(hidden), dtype=torch.int64))
            values.append(torch.full((len(hidden),), -torch.inf, dtype=torch.float64))
            end += len(hidden)
        ends.append(end)
    return Additions(torch.cat(ids), torch.cat(values), ends)


@dataclass(slots=True)
class PenaltyCounts:
    """The table [slots, V] of counts, int32, on the device. It grows to the most requests with penalties at a time.

    Slot 0 stays zero and serves all requests without penalties.
    """

    vocab_size: int
    device: torch.device
    table_SV: torch.Tensor = field(init=False)
    _free: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.table_SV = self._zeros(1)

    def place(self, requests: Sequence[Request]) -> tuple[list[int], list[int], list[int]]:
        """Return the slots of the requests, and the counts to `add`: places in the flattened table, and amounts."""
        slots: list[int] = []
        places: list[int] = []
        amounts: list[int] = []
        for request in requests:
            if not has_penalties(request.params):
                slots.append(0)
                continue
            kept = _kept(request)
            if not kept.slot:
                kept.slot = self._take()
                weakref.finalize(kept, self._free.append, kept.slot).atexit = False
                if request.params.repetition_penalty != 1:
                    prompt_ids = set(request.prompt_ids)
                    places += [kept.slot * self.vocab_size + token_id for token_id in prompt_ids]
                    amounts += [_IN_PROMPT] * len(prompt_ids)
            new_ids = request.output_ids[kept.num_counted :]
            kept.num_counted = len(request.output_ids)
            places += [kept.slot * self.vocab_size + token_id for token_id in new_ids]
            amounts += [1] * len(new_ids)
            slots.append(kept.slot)
        return slots, places, amounts

    def add(self, places_E: torch.Tensor, amounts_E: torch.Tensor) -> None:
        """Add what `place` returned, uploaded to the device."""
        self.table_SV.view(-1).index_add_(0, places_E, amounts_E.to(torch.int32))

    def _take(self) -> int:
        if self._free:
            slot = self._free.pop()
            self.table_SV[slot].zero_()
            return slot
        size = self.table_SV.shape[0]
        self.table_SV = torch.cat([self.table_SV, self._zeros(max(size, 7))])
        self._free += range(self.table_SV.shape[0] - 1, size, -1)
        return size

    def _zeros(self, num_slots: int) -> torch.Tensor:
        return torch.zeros(num_slots, self.vocab_size, dtype=torch.int32, device=self.device)


def apply_penalties(
    logits_NV: torch.Tensor,
    counts_NV: torch.Tensor,
    *,
    repetition_N: torch.Tensor,
    frequency_N: torch.Tensor,
    presence_N: torch.Tensor,
) -> torch.Tensor:
    """Apply the repetition penalty (Keskar et al., "CTRL", 2019), then frequency and presence (OpenAI's API).

    counts_NV: rows of the table of `PenaltyCounts`.
    """
    repetition_N1 = repetition_N.to(logits_NV.dtype).unsqueeze(-1)
    repeated_NV = torch.where(logits_NV > 0, logits_NV / repetition_N1, logits_NV * repetition_N1)
    logits_NV = torch.where(counts_NV > 0, repeated_NV, logits_NV)
    generated_NV = counts_NV % _IN_PROMPT
    penalty_NV = frequency_N.to(logits_NV.dtype).unsqueeze(-1) * generated_NV
    penalty_NV += presence_N.to(logits_NV.dtype).unsqueeze(-1) * (generated_NV > 0)
    return logits_NV - penalty_NV


def _kept(request: Request) -> _Kept:
    if not isinstance(request.sampling, _Kept):
        request.sampling = _Kept()
    return request.sampling
