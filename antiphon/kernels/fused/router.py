"""The best K of E experts in one launch: K times the largest of those left, in registers.

Groups are chosen in the same way first, by sums of their best experts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up, is_double, power_of_two
from antiphon.kernels.router import GroupLimit, PairCounts, Scoring, check_choice

_TILE_ELEMENTS = 1024


@triton.jit
def _in_best_groups(
    choice,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_OF_GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Whether each expert is in one of the best groups."""
    experts = tl.arange(0, BLOCK_E)[None, :]
    groups = tl.arange(0, BLOCK_G)[None, :]
    scores = tl.full([BLOCK_T, BLOCK_G], float("-inf"), choice.dtype)
    for group in tl.static_range(GROUPS):
        left = tl.broadcast_to(experts // SIZE == group, [BLOCK_T, BLOCK_E])
        score = tl.zeros([BLOCK_T], choice.dtype)[:, None]
        for _ in tl.static_range(BEST_OF_GROUP):
            best = tl.max(tl.where(left, choice, float("-inf")), 1)[:, None]
            chosen = tl.min(tl.where(left & (choice == best), experts, BLOCK_E), 1)[:, None]
            left = left & (experts != chosen)
            score += best
        scores = tl.where(groups == group, score, scores)
    kept = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
    left = tl.broadcast_to(groups < GROUPS, [BLOCK_T, BLOCK_G])
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.max(tl.where(left, scores, float("-inf")), 1)[:, None]
        chosen = tl.min(tl.where(left & (scores == best), groups, BLOCK_G), 1)[:, None]
        left = left & (groups != chosen)
        kept = kept | (experts // SIZE == chosen)
    return kept


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    logits_TE,
    bias_E,
    num_real_1,
    ids_TK,
    weights_TK,
    counts_E,
    switch_1,
    num_tokens,
    stride_token,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    PADDED: tl.constexpr,
    COUNTED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_OF_GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)[None, :]
    slots = tl.arange(0, BLOCK_K)[None, :]
    real = experts < E
    inside = (tokens < num_tokens)[:, None]
    starts = tokens.to(tl.int64)[:, None] * stride_token
    logits = tl.load(logits_TE + starts + experts, mask=inside & real, other=float("-inf"))
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-logits))
        choice = scores
        if BIASED:
            choice += tl.load(bias_E + experts, mask=real, other=0)
    else:
        raised = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = raised / tl.sum(raised, 1)[:, None]
        choice = logits if GROUPS == 0 else scores
    choice = tl.where(choice == choice, choice, float("-inf"))  # nan comes last
    left = tl.broadcast_to(real, [BLOCK_T, BLOCK_E])
    if GROUPS > 0:
        left = left & _in_best_groups(choice, E // GROUPS, GROUPS, TOP_GROUPS, BEST_OF_GROUP, BLOCK_G, BLOCK_T, BLOCK_E)
    ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int64)
    weights = tl.zeros([BLOCK_T, BLOCK_K], WIDE)
    for slot in tl.static_range(K):
        best = tl.max(tl.where(left, choice, float("-inf")), 1)[:, None]
        # The lowest id of equal ones. An expert cannot be chosen twice, not even at minus infinity.
        chosen = tl.min(tl.where(left & (choice == best), experts, BLOCK_E), 1)[:, None]
        weight = tl.sum(tl.where(experts == chosen, scores, 0.0), 1)[:, None]
        left = left & (experts != chosen)
        ids = tl.where(slots == slot, chosen.to(tl.int64), ids)
        weights = tl.where(slots == slot, weight, weights)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 1)[:, None] + 1e-20)
    if PADDED:
        ids = tl.where((tokens < tl.load(num_real_1))[:, None], ids, -1)
    places = tokens.to(tl.int64)[:, None] * K + slots
    mask = inside & (slots < K)
    tl.store(ids_TK + places, ids, mask=mask)
    tl.store(weights_TK + places, weights * SCALE, mask=mask)
    if COUNTED:
        counted = mask & (ids >= 0) & (tl.load(switch_1) != 0)
        tl.atomic_add(counts_E + ids, tl.full([BLOCK_T, BLOCK_K], 1, tl.int64), mask=counted, sem="relaxed")


@lru_cache(maxsize=NUM_SHAPES)
def _choose(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    stride_token: int,
    scoring: Scoring,
    biased: bool,
    padded: bool,
    counted: bool,
    normalize: bool,
    scale: float,
    limit: GroupLimit | None,
    double: bool,
) -> Launch:
    block_e = power_of_two(num_experts)
    block_t = max(1, _TILE_ELEMENTS // block_e)
    return Launch(
        _choose_kernel,
        (divide_up(num_tokens, block_t), 1),
        integers=(num_tokens, stride_token),
        constants={
            "SCALE": scale,
            "E": num_experts,
            "K": top_k,
            "SIGMOID": scoring is Scoring.SIGMOID,
            "BIASED": biased,
            "PADDED": padded,
            "COUNTED": counted,
            "NORMALIZE": normalize,
            "GROUPS": limit.num_groups if limit else 0,
            "TOP_GROUPS": limit.top_groups if limit else 0,
            "BEST_OF_GROUP": limit.best_of_group if limit else 0,
            "BLOCK_G": power_of_two(limit.num_groups) if limit else 1,
            "BLOCK_T": block_t,
            "BLOCK_E": block_e,
            "BLOCK_K": power_of_two(top_k),
            "DOUBLE": double,
        },
    )


def choose_experts_fused(
    logits_TE: torch.Tensor,
    top_k: int,
    scoring: Scoring,
    *,
    bias_E: torch.Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    limit: GroupLimit | None = None,
    num_real_1: torch.Tensor | None = None,
    counts: PairCounts | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `choose_experts`."""
    check_choice(logits_TE, top_k, scoring, bias_E, limit)
    num_tokens, num_experts = logits_TE.shape
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    ids_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights_TK = logits_TE.new_empty(num_tokens, top_k)
    if num_tokens == 0:
        return ids_TK, weights_TK
    launch = _choose(
        num_tokens,
        num_experts,
        top_k,
        logits_TE.stride(0),
        scoring,
        bias_E is not None,
        num_real_1 is not None,
        counts is not None,
        normalize,
        scale,
        limit,
        is_double(logits_TE.dtype),
    )
    launch(
        logits_TE,
        logits_TE if bias_E is None else bias_E,
        ids_TK if num_real_1 is None else num_real_1,
        ids_TK,
        weights_TK,
        *((ids_TK, ids_TK) if counts is None else counts),
    )
    return ids_TK, weights_TK
