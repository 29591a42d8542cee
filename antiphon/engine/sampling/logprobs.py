"""How likely tokens were by the model itself: log-softmax of its logits as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from antiphon.engine.sampling.draw import likeliest
from antiphon.engine.scheduling.sampled import NewToken


def score_tokens(
    logits_NV: torch.Tensor, token_ids_N: torch.Tensor, on_host: Sequence[int], tops: Sequence[int]
) -> list[NewToken]:
    """One token for each row, with its logprob, rank and the so many likeliest ones. One copy to the host.

    token_ids_N is on the device of the logits, and `on_host` the same; the logits are not changed.
    """
    logprobs_NV = logits_NV.log_softmax(-1)
    chosen_N1 = logprobs_NV.gather(1, token_ids_N.unsqueeze(-1))
    rank_N1 = (logprobs_NV > chosen_N1).sum(-1, keepdim=True) + 1
    count = min(max(tops), logits_NV.shape[1])
    # Chosen by the logits: log-softmax can round neighbours to one value.
    ids_NK = likeliest(logits_NV, count)[1]
    top_NK = logprobs_NV.gather(1, ids_NK)
    packed = torch.cat([chosen_N1.double(), rank_N1.double(), ids_NK.double(), top_NK.double()], dim=-1).tolist()
    return [
        NewToken(
            token_id=token_id,
            logprob=row[0],
            rank=int(row[1]),
            top=tuple((int(row[2 + i]), row[2 + count + i]) for i in range(min(top, count))),
        )
        for token_id, row, top in zip(on_host, packed, tops, strict=True)
    ]
