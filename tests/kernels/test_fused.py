"""Triton kernels against their plain-torch twins, on random inputs between poisoned neighbors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from antiphon.kernels.activation import gated_silu
from antiphon.kernels.fused import experts as fused_experts
from antiphon.kernels.fused.activation import gated_silu_fused, launch_gated_silu
from antiphon.kernels.fused.experts import add_up, grouped_experts_fused, place_pairs, spread_rows
from antiphon.kernels.fused.gqa_write import norm_rotate_write_fused
from antiphon.kernels.fused.latent_write import norm_rotate_write_latents_fused
from antiphon.kernels.fused.norm_rope import add_rms_norm_fused, apply_rope_fused, rms_norm_fused
from antiphon.kernels.fused.pack import add_parts_fused, pack_rows_fused
from antiphon.kernels.fused.router import choose_experts_fused
from antiphon.kernels.gqa_write import HeadNorms, norm_rotate_write
from antiphon.kernels.grouped_experts import ExpertWorkspace, grouped_experts
from antiphon.kernels.latent_write import norm_rotate_write_latents
from antiphon.kernels.norm_rope import add_rms_norm, apply_rope, rms_norm
from antiphon.kernels.pack import add_parts, pack_rows
from antiphon.kernels.router import GroupLimit, Scoring, choose_experts
from tests.kernels.tensors import DEVICE, NAN, make_ids, padded, randn, relative_error

# The interpreter cuts off what bfloat16 cannot hold; devices round.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1.5e-2 if DEVICE.type == "cuda" else 3e-2,
}
DTYPES = list(TOLERANCE)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, interpreting


# ---- experts


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "top_k", "num_ids", "first", "num_experts"),
    [(70, 4, 11, 3, 5), (300, 1, 4, 0, 4), (1, 2, 8, 4, 4), (33, 8, 24, 8, 16), (40, 3, 9, 20, 6), (64, 2, 6, 5, 1)],
)
def test_places_are_in_order_of_expert_then_row(
    num_rows: int, top_k: int, num_ids: int, first: int, num_experts: int, dtype: torch.dtype
) -> None:
    """Over several blocks, with experts of others below and above; the last but one has none of its own."""
    ids_RK = padded(make_ids(num_rows, top_k, num_ids, seed=1, dtype=dtype), 3, filling=first)
    assert_placed(ids_RK, first, num_experts)


@pytest.mark.parametrize(("num_rows", "top_k"), [(150, 7), (500, 3), (17, 1)])
def test_places_of_blocks_of_several_parts(num_rows: int, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with many rows: no more blocks than so many, and counts that are added up in several loads."""
    monkeypatch.setattr(fused_experts, "_MAX_BLOCKS", 3)
    monkeypatch.setattr(fused_experts, "_COUNTS_PER_LOAD", 16)
    fused_experts._count_and_place.cache_clear()
    try:
        assert_placed(make_ids(num_rows, top_k, 12, seed=2), 2, 9)
    finally:
        fused_experts._count_and_place.cache_clear()


def assert_placed(ids_RK: torch.Tensor, first: int, num_experts: int) -> None:
    places_RK, ends_E = place_pairs(ids_RK, num_experts, ExpertWorkspace(), first_expert=first)
    pair_ids = ids_RK.flatten().tolist()
    local = [pair for pair, number in enumerate(pair_ids) if first <= number < first + num_experts]
    order = sorted(local, key=lambda pair: pair_ids[pair])
    expected = [-1] * len(pair_ids)
    for place, pair in enumerate(order):
        expected[pair] = place
    assert places_RK.flatten().tolist() == expected
    assert ends_E.tolist() == [sum(pair_ids[pair] - first <= expert for pair in local) for expert in range(num_experts)]


def test_rows_go_to_their_places_and_nowhere_else() -> None:
    x_RD = padded(randn(9, 40, seed=2), 8)
    ids_RK = make_ids(9, 3, 8, seed=3)
    ids_RK[4] = 7
    x_RD[4] = NAN  # not read: all its experts are elsewhere
    places_RK, ends_E = place_pairs(ids_RK, 4, ExpertWorkspace())
    x_XD = torch.full((30, 40), 77.0, device=DEVICE)
    spread_rows(x_RD, places_RK, x_XD)
    num_local = int(ends_E[-1])
    assert 0 < num_local < 27
    for row, places in enumerate(places_RK.tolist()):
        for place in places:
            assert place < 0 or torch.equal(x_XD[place], x_RD[row])
    assert (x_XD[num_local:] == 77.0).all()


def test_sums_take_no_weight_of_other_ranks() -> None:
    """Infinite weights and undefined rows of pairs that are not here."""
    places_RK = torch.tensor([[1, -1], [-1, -1], [0, 2]], dtype=torch.int32, device=DEVICE)
    weights_RK = torch.tensor([[0.5, float("inf")], [NAN, float("inf")], [2.0, -1.0]], device=DEVICE)
    y_XD = torch.cat([randn(3, 24, seed=4), torch.full((3, 24), NAN, device=DEVICE)])
    out_RD = padded(torch.full((3, 24), NAN, device=DEVICE), 8, filling=77.0)
    add_up(y_XD, places_RK, padded(weights_RK, 3), out_RD)
    expected = torch.stack([0.5 * y_XD[1], torch.zeros_like(y_XD[0]), 2.0 * y_XD[0] - y_XD[2]])
    torch.testing.assert_close(out_RD, expected)
    assert (out_RD.as_strided((3, 8), out_RD.stride(), 24) == 77.0).all()


@pytest.mark.parametrize("max_pairs", [50, 10_000], ids=["several-passes", "one-pass"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "top_k", "num_ids", "first", "hidden", "width"),
    [(40, 3, 9, 2, 32, 16), (21, 6, 6, 0, 24, 40), (6, 2, 5, 5, 16, 8), (1, 1, 5, 1, 19, 13)],
    ids=["some-elsewhere", "mostly-here", "none-here", "odd-sizes"],
)
def test_experts(
    num_rows: int, top_k: int, num_ids: int, first: int, hidden: int, width: int, dtype: torch.dtype, max_pairs: int
) -> None:
    """Twice with one workspace, so that what the first call left behind is under the second."""
    wide = torch.promote_types(dtype, torch.float32)
    gate_up = (randn(5, 2 * width, hidden, seed=5) / hidden**0.5).to(dtype)
    down = (randn(5, hidden, width, seed=6) / width**0.5).to(dtype)
    workspace = ExpertWorkspace(max_pairs=max_pairs)
    for seed in (10, 20):
        x_RD = padded(randn(num_rows, hidden, seed=seed, dtype=dtype), 8)
        ids_RK = padded(make_ids(num_rows, top_k, num_ids, seed=seed + 1, dtype=torch.int32), 2, filling=first)
        weights_RK = padded(randn(num_rows, top_k, seed=seed + 2, dtype=wide), 2)
        out_RD = padded(torch.full_like(x_RD, NAN), 8, filling=77.0)
        result = grouped_experts_fused(
            x_RD, ids_RK, weights_RK, gate_up, down, out_RD=out_RD, first_expert=first, workspace=workspace
        )
        assert result is out_RD
        expected = grouped_experts.reference(x_RD, ids_RK, weights_RK, gate_up, down, first_expert=first)
        assert relative_error(out_RD, expected) < TOLERANCE[dtype]
        assert (out_RD.as_strided((num_rows, 8), out_RD.stride(), hidden) == 77.0).all()


def test_a_workspace_keeps_its_memory() -> None:
    gate_up, down = randn(4, 16, 16, seed=7), randn(4, 16, 8, seed=8)
    workspace = ExpertWorkspace()
    sizes = []
    for num_rows in (12, 5, 12, 14):
        x_RD, weights_RK = randn(num_rows, 16, seed=9), randn(num_rows, 2, seed=10)
        grouped_experts_fused(x_RD, make_ids(num_rows, 2, 4, seed=11), weights_RK, gate_up, down, workspace=workspace)
        sizes.append(workspace.num_bytes)
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(5, 8), (70, 300), (1, 1), (0, 16)])
def test_gated_silu(num_rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up_XG = randn(num_rows, 2 * width, seed=12, dtype=dtype) * 3
    out_XF = gated_silu_fused(gate_up_XG)
    assert out_XF.shape == (num_rows, width)
    assert out_XF.dtype == dtype
    assert relative_error(out_XF, gated_silu.reference(gate_up_XG)) < TOLERANCE[dtype]


def test_gated_silu_of_real_pairs_only() -> None:
    """The device knows where they end, here inside a tile of several; behind it nothing is written."""
    gate_up_XG, out_XF = randn(3000, 16, seed=12), torch.full((3000, 8), 77.0, device=DEVICE)
    launch_gated_silu(gate_up_XG, out_XF, torch.tensor([5, 5, 777], dtype=torch.int32, device=DEVICE))
    torch.testing.assert_close(out_XF[:777], gated_silu.reference(gate_up_XG[:777]), rtol=1e-5, atol=1e-6)
    assert (out_XF[777:] == 77.0).all()


# ---- norm and rope


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("shape", [(5, 64), (3, 2100), (70, 7), (6, 3, 16), (2, 3, 2, 8), (0, 8)], ids=str)
def test_rms_norm(shape: tuple[int, ...], eps: float, dtype: torch.dtype) -> None:
    x, weight_D = padded(randn(*shape, seed=13, dtype=dtype), 8), randn(shape[-1], seed=14, dtype=dtype)
    out = rms_norm_fused(x, weight_D, eps)
    assert out.is_contiguous()
    assert out.dtype == dtype
    torch.testing.assert_close(out, rms_norm.reference(x, weight_D, eps), rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (3, 2100), (0, 8)], ids=str)
@pytest.mark.parametrize("gap", [0, 16])
@pytest.mark.parametrize("more", [False, True])
def test_add_and_rms_norm(shape: tuple[int, int], gap: int, more: bool, dtype: torch.dtype) -> None:
    """The sum is in the memory of the residual, or new if that has gaps."""
    x_TD, residual_TD = padded(randn(*shape, seed=15, dtype=dtype), 8), randn(*shape, seed=16, dtype=dtype)
    residual_TD, before_TD = padded(residual_TD, gap) if gap else residual_TD, residual_TD.clone()
    weight_D = randn(shape[1], seed=17, dtype=dtype)
    more_TD = padded(randn(*shape, seed=18, dtype=dtype), 8) if more else None
    out_TD, sum_TD = add_rms_norm_fused(x_TD, residual_TD, weight_D, 1e-6, more_TD=more_TD)
    expected_TD, expected_sum_TD = add_rms_norm.reference(x_TD, before_TD, weight_D, 1e-6, more_TD=more_TD)
    assert torch.equal(residual_TD, before_TD if gap else sum_TD)
    if DEVICE.type == "cuda" or dtype != torch.bfloat16:
        assert torch.equal(sum_TD, expected_sum_TD)
    # Interpreted, the sum of two numbers is cut off before the third is added.
    atol = 0.05 if more and DEVICE.type != "cuda" and dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(sum_TD, expected_sum_TD, rtol=TOLERANCE[dtype], atol=atol)
    torch.testing.assert_close(out_TD, expected_TD, rtol=TOLERANCE[dtype], atol=atol)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 8), (70, 4, 12), (7, 2), (0, 3, 8)], ids=str)
def test_rope(shape: tuple[int, ...], interleaved: bool, dtype: torch.dtype, in_place: bool) -> None:
    """The rotary part of heads that have a part in front."""
    heads = randn(*shape[:-1], 16 + shape[-1], seed=18, dtype=dtype)
    x, plain = heads[..., 16:], heads[..., :16].clone()
    angles_TP = randn(shape[0], shape[-1] // 2, seed=19) * 3
    cos_TP, sin_TP = angles_TP.cos().to(dtype), angles_TP.sin().to(dtype)
    expected = apply_rope.reference(x, cos_TP, sin_TP, interleaved=interleaved)
    out = apply_rope_fused(x, cos_TP, sin_TP, interleaved=interleaved, out=x if in_place else None)
    assert (out is x) == in_place
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(heads[..., :16], plain)


# ---- partial sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_parts", [3, 4, 8, 9, 15, 17])
@pytest.mark.parametrize("shape", [(70, 32), (3, 7), (1, 1), (0, 8)], ids=str)
def test_sums_of_parts(shape: tuple[int, int], num_parts: int, dtype: torch.dtype) -> None:
    """In their order and rounded once: the first and the last cancel, and what comes between is small."""
    parts = [randn(*shape, seed=seed, dtype=dtype) for seed in range(num_parts)]
    parts[0] = parts[0] * 300
    parts[-1] = -parts[0]
    parts[1] = padded(parts[1], 8)
    sum_TD, expected_TD = add_parts_fused(*parts), add_parts.reference(*parts)
    assert sum_TD.dtype == dtype
    if DEVICE.type == "cuda" or dtype != torch.bfloat16:
        assert torch.equal(sum_TD, expected_TD)
    torch.testing.assert_close(sum_TD, expected_TD, rtol=TOLERANCE[dtype], atol=1e-6)


# ---- router


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("scoring", "biased"), [(Scoring.SOFTMAX, False), (Scoring.SIGMOID, False), (Scoring.SIGMOID, True)]
)
@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 4), (60, 6), (5, 5), (1, 1)])
def test_choice(
    num_experts: int, top_k: int, scoring: Scoring, biased: bool, normalize: bool, dtype: torch.dtype
) -> None:
    logits_TE = padded(randn(37, num_experts, seed=20, dtype=dtype) * 2, 4)
    bias_E = randn(num_experts, seed=21, dtype=dtype) if biased else None
    ids_TK, weights_TK = choose_experts_fused(logits_TE, top_k, scoring, bias_E=bias_E, normalize=normalize, scale=2.5)
    expected_ids_TK, expected_TK = choose_experts.reference(
        logits_TE, top_k, scoring, bias_E=bias_E, normalize=normalize, scale=2.5
    )
    assert ids_TK.dtype == torch.int64
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("scoring", "biased", "best"),
    [(Scoring.SOFTMAX, False, 1), (Scoring.SIGMOID, False, 2), (Scoring.SIGMOID, True, 2)],
)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_groups", "top_groups"),
    [(64, 6, 8, 3), (60, 6, 5, 2), (12, 4, 6, 2), (12, 3, 4, 1), (16, 3, 8, 7)],
)
def test_choice_in_groups(
    num_experts: int,
    top_k: int,
    num_groups: int,
    top_groups: int,
    scoring: Scoring,
    biased: bool,
    best: int,
    dtype: torch.dtype,
) -> None:
    """With equal experts and groups, and with padding."""
    limit = GroupLimit(num_groups=num_groups, top_groups=top_groups, best_of_group=best)
    logits_TE = padded(randn(37, num_experts, seed=20, dtype=dtype) * 2, 4)
    logits_TE[3:6] = logits_TE[3:6].round()
    logits_TE[6] = 0.5
    bias_E = randn(num_experts, seed=21, dtype=dtype) if biased else None
    options = {"bias_E": bias_E, "normalize": True, "scale": 2.5, "limit": limit}
    num_real_1 = torch.tensor([33], device=DEVICE)
    ids_TK, weights_TK = choose_experts_fused(logits_TE, top_k, scoring, num_real_1=num_real_1, **options)
    expected_ids_TK, expected_TK = choose_experts.reference(logits_TE, top_k, scoring, **options)
    assert torch.equal(ids_TK[:33], expected_ids_TK[:33])
    assert ids_TK[33:].eq(-1).all()
    torch.testing.assert_close(weights_TK, expected_TK, rtol=TOLERANCE[dtype], atol=0)
    groups = [{expert // (num_experts // num_groups) for expert in ids} for ids in ids_TK[:33].tolist()]
    assert max(map(len, groups)) == min(top_groups, top_k)


@pytest.mark.parametrize("choose", [choose_experts_fused, choose_experts.reference])
def test_refused_groups_are_refused_whatever_the_logits_hold(choose) -> None:  # type: ignore[no-untyped-def]
    """The experts left in the allowed groups are taken even at minus infinity."""
    inf = float("inf")
    logits_TE = torch.tensor(
        [[NAN] * 8, [-inf] * 8, [inf] * 8, [NAN, NAN, 1.0, 2.0, NAN, NAN, 3.0, NAN]], device=DEVICE
    )
    bias_E = torch.tensor([-inf] * 2 + [0.0] * 6, device=DEVICE)
    limit = GroupLimit(num_groups=4, top_groups=2, best_of_group=2)
    ids_TK, _ = choose(logits_TE, 4, Scoring.SIGMOID, limit=limit)
    assert [sorted(ids) for ids in ids_TK.tolist()] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    ids_TK, _ = choose(logits_TE[1:3], 4, Scoring.SIGMOID, bias_E=bias_E, limit=limit)
    assert ids_TK.tolist() == [[2, 3, 4, 5]] * 2


@pytest.mark.parametrize("num_real", [0, 1, 20, 37])
@pytest.mark.parametrize("choose", [choose_experts_fused, choose_experts.reference])
def test_padding_has_no_expert(choose, num_real: int) -> None:  # type: ignore[no-untyped-def]
    logits_TE = randn(37, 16, seed=23)
    logits_TE[num_real:] = float("inf")
    ids_TK, weights_TK = choose(
        logits_TE, 4, Scoring.SOFTMAX, normalize=True, num_real_1=torch.tensor([num_real], device=DEVICE)
    )
    expected_ids_TK, expected_TK = choose(logits_TE[:num_real], 4, Scoring.SOFTMAX, normalize=True)
    assert torch.equal(ids_TK[:num_real], expected_ids_TK)
    assert torch.equal(weights_TK[:num_real], expected_TK)
    assert ids_TK[num_real:].eq(-1).all()


def test_choice_is_topk() -> None:
    """The reference against torch's own."""
    logits_TE = randn(50, 24, seed=22)
    ids_TK, weights_TK = choose_experts(logits_TE, 4, Scoring.SOFTMAX, normalize=True)
    best = logits_TE.softmax(-1).topk(4)
    assert torch.equal(ids_TK, best.indices)
    torch.testing.assert_close(weights_TK, best.values / best.values.sum(-1, keepdim=True))


@pytest.mark.parametrize("choose", [choose_experts_fused, choose_experts.reference])
def test_of_equal_experts_the_lower_one(choose) -> None:  # type: ignore[no-untyped-def]
    logits_TE = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0], [0.0] * 5], device=DEVICE)
    ids_TK, _ = choose(logits_TE, 3, Scoring.SIGMOID)
    assert ids_TK.tolist() == [[1, 3, 0], [0, 1, 2]]


@pytest.mark.parametrize("scoring", list(Scoring))
@pytest.mark.parametrize("choose", [choose_experts_fused, choose_experts.reference])
def test_ids_are_usable_whatever_the_logits_hold(choose, scoring: Scoring) -> None:  # type: ignore[no-untyped-def]
    inf = float("inf")
    logits_TE = torch.tensor([[NAN] * 5, [-inf] * 5, [inf] * 5, [NAN, 1.0, -inf, inf, 2.0]], device=DEVICE)
    ids_TK, _ = choose(logits_TE, 4, scoring)
    for ids in ids_TK.tolist():
        assert len(set(ids)) == 4
        assert all(0 <= number < 5 for number in ids)
    if scoring is Scoring.SIGMOID:
        assert ids_TK[3].tolist() == [3, 4, 1, 2]


# ---- queries, keys and values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_size", "num_pairs"),
    [(70, 4, 2, 16, 8), (5, 3, 1, 16, 3), (33, 2, 2, 128, 32), (1, 1, 1, 2, 1), (0, 2, 1, 8, 4)],
)
def test_norm_rotate_write(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_pairs: int,
    with_norms: bool,
    dtype: torch.dtype,
) -> None:
    """Of all, of half and of an odd part of a head; into slots in disorder, and no others."""
    qkv_TX = padded(randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_size, seed=30, dtype=dtype), 8, 77.0)
    angles_TP = randn(num_tokens, num_pairs, seed=31) * 3
    cos_TP, sin_TP = angles_TP.cos().to(dtype), angles_TP.sin().to(dtype)
    norms = None
    if with_norms:
        weights = [randn(head_size, seed=seed, dtype=dtype) for seed in (32, 33)]
        norms = HeadNorms(*weights, eps=0.1)
    slots_T = torch.randperm(96, generator=torch.Generator().manual_seed(34))[:num_tokens].to(DEVICE)
    expected_cache = torch.full((24, 4, 2 * num_kv_heads * head_size), 55.0, dtype=dtype, device=DEVICE)
    cache, sizes = expected_cache.clone(), {"num_kv_heads": num_kv_heads, "head_size": head_size, "norms": norms}
    expected = norm_rotate_write.reference(qkv_TX.clone(), cos_TP, sin_TP, expected_cache, slots_T, **sizes)
    actual = norm_rotate_write_fused(qkv_TX, cos_TP, sin_TP, cache, slots_T, **sizes)
    assert [x.shape[1] for x in actual] == [num_heads, num_kv_heads, num_kv_heads]
    for x, expected_x in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, expected_x, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(cache, expected_cache, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert int((cache != 55.0).any(-1).sum()) == num_tokens
    assert (qkv_TX.as_strided((num_tokens, 8), qkv_TX.stride(), qkv_TX.shape[1]) == 77.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("num_tokens", "size", "num_pairs"), [(37, 48, 8), (5, 512, 32), (3, 7, 3), (0, 8, 2)])
def test_norm_rotate_write_latents(
    num_tokens: int, size: int, num_pairs: int, interleaved: bool, dtype: torch.dtype
) -> None:
    width = size + 2 * num_pairs
    latent_TX = padded(randn(num_tokens, width, seed=35, dtype=dtype), 8)
    before, weight_C = latent_TX.clone(), randn(size, seed=36, dtype=dtype)
    angles_TP = randn(num_tokens, num_pairs, seed=37) * 3
    cos_TP, sin_TP = angles_TP.cos().to(dtype), angles_TP.sin().to(dtype)
    slots_T = torch.randperm(48, generator=torch.Generator().manual_seed(38))[:num_tokens].to(DEVICE)
    cache = torch.full((12, 4, width), 55.0, dtype=dtype, device=DEVICE)
    expected_cache = cache.clone()
    out_TX = norm_rotate_write_latents_fused(
        latent_TX, weight_C, 0.1, cos_TP, sin_TP, cache, slots_T, interleaved=interleaved
    )
    expected_TX = norm_rotate_write_latents.reference(
        latent_TX, weight_C, 0.1, cos_TP, sin_TP, expected_cache, slots_T, interleaved=interleaved
    )
    torch.testing.assert_close(out_TX, expected_TX, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(cache.flatten(0, 1)[slots_T], out_TX)
    assert int((cache != 55.0).any(-1).sum()) == num_tokens
    assert torch.equal(latent_TX, before)


# ---- packed rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("num_tokens", "size", "top_k"), [(9, 40, 3), (3, 2500, 8), (5, 16, 1), (1, 1, 1), (0, 16, 2)])
def test_pack(num_tokens: int, size: int, top_k: int, across: bool, dtype: torch.dtype) -> None:
    """Every part between neighbors that stay as they are, from sources with gaps. across: columns lie together."""
    wide = torch.promote_types(dtype, torch.float32)
    sources = (
        padded(randn(num_tokens, size, seed=40, dtype=dtype), 4),
        padded(randn(num_tokens, top_k, seed=41, dtype=wide), 3),
        padded(make_ids(num_tokens, top_k, 11, seed=42), 5, filling=99),
    )
    if across:
        sources = tuple(source.t().contiguous().t() for source in sources)
    dtypes = (dtype, wide, torch.int32)
    outs, expected = (
        [
            padded(torch.zeros(num_tokens, width, dtype=kind, device=DEVICE), 8, filling=77)
            for width, kind in zip((size, top_k, top_k), dtypes, strict=True)
        ]
        for _ in range(2)
    )
    pack_rows_fused(*outs, *sources)
    pack_rows.reference(*expected, *sources)
    for out, expected_out, source in zip(outs, expected, sources, strict=True):
        assert torch.equal(out, expected_out)
        assert torch.equal(out.to(source.dtype), source)
        assert (out.as_strided((num_tokens, 8), out.stride(), out.shape[1]) == 77).all()
