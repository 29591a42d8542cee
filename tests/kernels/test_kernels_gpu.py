"""On a CUDA device: the public functions at real shapes, against float32, and without waiting for the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from antiphon.kernels import gqa_attention
from antiphon.kernels.activation import gated_silu
from antiphon.kernels.causal_attention import _takes_flash, causal_attention_reference
from antiphon.kernels.gqa_write import HeadNorms, norm_rotate_write
from antiphon.kernels.grouped_experts import ExpertWorkspace, grouped_experts
from antiphon.kernels.mla_attention import prefill_attention
from antiphon.kernels.norm_rope import add_rms_norm, apply_rope, rms_norm
from antiphon.kernels.pack import add_in_rank_order, add_parts, pack_rows
from antiphon.kernels.router import GroupLimit, Scoring, choose_experts
from antiphon.models.router import Router, RoutingConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BFLOAT16 = torch.bfloat16


def randn(*shape: int, seed: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_without_waiting(function: Callable[[], torch.Tensor]) -> torch.Tensor:
    function()  # compiles, and allocates
    with no_waiting():
        return function()


def packed_rows(
    num_rows: int, hidden: int, top_k: int, num_ids: int, dtype: torch.dtype, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, weights and global ids side by side in rows of bytes, with gaps that are not multiples of 32 bytes."""
    x_bytes = hidden * dtype.itemsize
    row_bytes = -(-(x_bytes + 8 * top_k) // 16) * 16 + 16
    rows = torch.full((num_rows, row_bytes), 255, dtype=torch.uint8, device="cuda")  # nan, and ids of -1
    x_RD = rows[:, :x_bytes].view(dtype)
    weights_RK = rows[:, x_bytes : x_bytes + 4 * top_k].view(torch.float32)
    ids_RK = rows[:, x_bytes + 4 * top_k : x_bytes + 8 * top_k].view(torch.int32)
    x_RD.copy_(randn(num_rows, hidden, seed=seed, dtype=dtype))
    weights_RK.copy_(randn(num_rows, top_k, seed=seed + 1, dtype=torch.float32).abs())
    ids_RK.copy_(randn(num_rows, num_ids, seed=seed + 2, dtype=torch.float32).topk(top_k).indices)
    return x_RD, ids_RK, weights_RK


SHAPES = {
    "qwen3-30b": (4096, 2048, 768, 8, 128, 64),
    "deepseek-v2-lite": (3000, 2048, 1408, 6, 64, 32),
    "few-rows": (7, 2048, 768, 8, 128, 64),
    "one-row": (1, 1024, 512, 2, 4, 2),
    "no-rows": (0, 256, 128, 2, 16, 8),
    "none-here": (2, 256, 128, 2, 128, 1),
}


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32], ids=str)
@pytest.mark.parametrize("max_pairs", [262_144, 5000], ids=["one-pass", "several-passes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts(shape: str, max_pairs: int, dtype: torch.dtype) -> None:
    num_rows, hidden, width, top_k, num_ids, num_local = SHAPES[shape]
    first = num_ids - num_local
    gate_up = randn(num_local, 2 * width, hidden, seed=1, dtype=dtype) / hidden**0.5
    down = randn(num_local, hidden, width, seed=2, dtype=dtype) / width**0.5
    x_RD, ids_RK, weights_RK = packed_rows(num_rows, hidden, top_k, num_ids, dtype, seed=3)
    if shape == "none-here":
        ids_RK.fill_(0)
    workspace = ExpertWorkspace(max_pairs=max_pairs)
    out_RD = torch.full((num_rows, hidden), float("nan"), dtype=dtype, device="cuda")

    def compute() -> torch.Tensor:
        return grouped_experts(
            x_RD, ids_RK, weights_RK, gate_up, down, out_RD=out_RD, first_expert=first, workspace=workspace
        )

    result = run_without_waiting(compute) if dtype == BFLOAT16 else compute()
    expected = grouped_experts.reference(
        x_RD.float(), ids_RK, weights_RK, gate_up.float(), down.float(), first_expert=first
    )
    if shape in ("none-here", "no-rows"):
        assert result is out_RD
        assert (result == 0).all()
    else:
        assert expected.norm() > 0
        assert relative_error(result, expected) < (1e-2 if dtype == BFLOAT16 else 1e-5)
        first_run = result.clone()
        out_RD.fill_(float("nan"))
        assert torch.equal(compute(), first_run), "two runs differ"


def test_experts_in_a_graph() -> None:
    """Captured once, replayed with other tokens and another number of local pairs."""
    gate_up, down = randn(8, 512, 256, seed=4) / 16, randn(8, 256, 256, seed=5) / 16
    x_RD, ids_RK, weights_RK = packed_rows(40, 256, 4, 16, BFLOAT16, seed=6)
    workspace = ExpertWorkspace()
    out_RD = torch.empty(40, 256, dtype=BFLOAT16, device="cuda")
    grouped_experts(x_RD, ids_RK, weights_RK, gate_up, down, out_RD=out_RD, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped_experts(x_RD, ids_RK, weights_RK, gate_up, down, out_RD=out_RD, workspace=workspace)
    x_RD.copy_(randn(40, 256, seed=7))
    ids_RK[::3] = -1
    graph.replay()
    expected = grouped_experts.reference(x_RD.float(), ids_RK, weights_RK, gate_up.float(), down.float())
    assert relative_error(out_RD, expected) < 1e-2


def test_norms() -> None:
    qkv_THD, weight_D = randn(999, 40, 128, seed=8), randn(128, seed=9)
    q_THD = qkv_THD[:, :32]
    out_THD = run_without_waiting(lambda: rms_norm(q_THD, weight_D, 1e-6))
    torch.testing.assert_close(out_THD, rms_norm.reference(q_THD, weight_D, 1e-6), rtol=1e-2, atol=1e-6)
    for size in (576, 2048, 7168):
        x_TD, residual_TD, weight_D = randn(777, size, seed=10), randn(777, size, seed=11), randn(size, seed=12)
        more_TD = randn(777, size, seed=13) if size == 2048 else None
        both = add_rms_norm.reference(x_TD, residual_TD, weight_D, 1e-6, more_TD=more_TD)
        for actual, expected in zip(
            add_rms_norm(x_TD, residual_TD, weight_D, 1e-6, more_TD=more_TD), both, strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_in_place(interleaved: bool) -> None:
    """Many heads, so that threads that read and threads that write are far apart."""
    heads = randn(1500, 128, 192, seed=13)
    angles_TP = randn(1500, 32, seed=14, dtype=torch.float32) * 3
    cos_TP, sin_TP = angles_TP.cos().to(BFLOAT16), angles_TP.sin().to(BFLOAT16)
    x = heads[..., 128:]
    expected = apply_rope.reference(x.float(), cos_TP.float(), sin_TP.float(), interleaved=interleaved)
    apply_rope(x, cos_TP, sin_TP, interleaved=interleaved, out=x)
    torch.testing.assert_close(x.float(), expected, rtol=1e-2, atol=1e-2)


def test_gated_silu() -> None:
    gate_up_XG = randn(5001, 2 * 1408, seed=15)
    gate, up = gate_up_XG.float().chunk(2, dim=-1)
    assert relative_error(gated_silu(gate_up_XG), torch.nn.functional.silu(gate) * up) < 4e-3


@pytest.mark.parametrize("scoring", list(Scoring))
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (64, 6), (256, 8)])
def test_choice(num_experts: int, top_k: int, scoring: Scoring) -> None:
    logits_TE = randn(8192, num_experts, seed=16, dtype=torch.float32)
    bias_E = randn(num_experts, seed=17, dtype=torch.float32) / 10 if scoring is Scoring.SIGMOID else None
    ids_TK, weights_TK = choose_experts(logits_TE, top_k, scoring, bias_E=bias_E, normalize=True)
    expected_ids_TK, expected_TK = choose_experts.reference(logits_TE, top_k, scoring, bias_E=bias_E, normalize=True)
    same_T = (ids_TK == expected_ids_TK).all(1)
    assert same_T.float().mean() > 0.995  # sigmoids in another last digit swap neighbors now and then
    torch.testing.assert_close(weights_TK[same_T], expected_TK[same_T], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("num_texts", "num_new", "length"), [(1, 700, 700), (3, 256, 256), (1, 300, 1000), (1, 1, 513)]
)
def test_latent_prefill(num_texts: int, num_new: int, length: int) -> None:
    heads, query, rope, value, latent = 16, 128, 64, 128, 512
    q_NSHQ = randn(num_texts, num_new, heads, query + rope, seed=18)
    latents_NLC = randn(num_texts, length, latent + rope, seed=19)
    up_HXC = randn(heads, query + value, latent, seed=20) / 23
    out_NSHV = run_without_waiting(lambda: prefill_attention(q_NSHQ, latents_NLC, up_HXC, 0.07))
    assert out_NSHV.shape == (num_texts, num_new, heads, value)
    both_NHLX = torch.einsum("nlc,hxc->nhlx", latents_NLC[..., :latent].float(), up_HXC.float())
    rope_key_NHLP = latents_NLC[..., latent:].float().unsqueeze(1).expand(-1, heads, -1, -1)
    key_NHLQ = torch.cat([both_NHLX[..., :query], rope_key_NHLP], dim=-1)
    expected = causal_attention_reference(q_NSHQ.float().transpose(1, 2), key_NHLQ, both_NHLX[..., query:], 0.07)
    assert relative_error(out_NSHV, expected.transpose(1, 2)) < 2e-2


def test_latent_prefill_after_a_long_context_takes_little_memory() -> None:
    """In groups of heads; at once they would need 2.5 GiB and more."""
    heads, query, rope, value, latent, num_new, length = 64, 128, 64, 128, 512, 256, 32_768
    q_NSHQ = randn(1, num_new, heads, query + rope, seed=21)
    latents_NLC = randn(1, length, latent + rope, seed=22)
    up_HXC = randn(heads, query + value, latent, seed=23) / 23
    prefill_attention(q_NSHQ, latents_NLC, up_HXC, 0.07)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out_NSHV = run_without_waiting(lambda: prefill_attention(q_NSHQ, latents_NLC, up_HXC, 0.07))
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2**30
    some = slice(40, 43)
    both_NHLX = torch.einsum("nlc,hxc->nhlx", latents_NLC[..., :latent].float(), up_HXC[some].float())
    rope_key_NLHP = latents_NLC[..., latent:].float().unsqueeze(1).expand(-1, 3, -1, -1)
    key_NHLQ = torch.cat([both_NHLX[..., :query], rope_key_NLHP], dim=-1)
    q_NHSQ = q_NSHQ[:, :, some].float().transpose(1, 2)
    expected = causal_attention_reference(q_NHSQ, key_NHLQ, both_NHLX[..., query:], 0.07)
    assert relative_error(out_NSHV[:, :, some], expected.transpose(1, 2)) < 2e-2


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), [(32, 4, 128), (8, 8, 64), (12, 1, 80)])
@pytest.mark.parametrize(("num_new", "length"), [(300, 1000), (2, 17), (1, 513), (512, 4096)])
def test_grouped_query_prefill_after_a_context(
    num_new: int, length: int, num_heads: int, num_kv_heads: int, size: int
) -> None:
    """From the cache, by the flash kernel: no mask, no waiting."""
    cache = randn(400, 16, 2 * num_kv_heads * size, seed=24)
    blocks_B = torch.randperm(400, device="cuda")[: -(-length // 16)]
    q_NSHQ = randn(1, num_new, num_heads, size, seed=25)

    def attend() -> torch.Tensor:
        key_LGQ, value_LGQ = gqa_attention.gather_keys_values(cache, blocks_B, length, size)
        assert _takes_flash(*(x.unsqueeze(0).transpose(1, 2) for x in (q_NSHQ[0], key_LGQ, value_LGQ)))
        return gqa_attention.prefill_attention(q_NSHQ, key_LGQ.unsqueeze(0), value_LGQ.unsqueeze(0), 0.1)

    out_NSHQ = run_without_waiting(attend)
    keys_values = gqa_attention.gather_keys_values(cache.float(), blocks_B, length, size)
    wide = [x.float().unsqueeze(0).transpose(1, 2) for x in (q_NSHQ[0], *keys_values)]
    expected = causal_attention_reference(*wide, 0.1).transpose(1, 2)
    assert relative_error(out_NSHQ, expected) < 1e-2


@pytest.mark.parametrize("num_pairs", [64, 32])
@pytest.mark.parametrize(("num_tokens", "num_heads", "num_kv_heads"), [(4096, 32, 4), (1, 96, 8), (333, 64, 4)])
def test_norm_rotate_write(num_tokens: int, num_heads: int, num_kv_heads: int, num_pairs: int) -> None:
    """In place: threads that hold the same numbers must not read what others have written already."""
    qkv_TX = randn(num_tokens, (num_heads + 2 * num_kv_heads) * 128, seed=30)
    angles_TP = randn(num_tokens, num_pairs, seed=31, dtype=torch.float32) * 3
    cos_TP, sin_TP = angles_TP.cos().to(BFLOAT16), angles_TP.sin().to(BFLOAT16)
    norms = HeadNorms(randn(128, seed=32), randn(128, seed=33), 1e-6)
    slots_T = torch.randperm(5000, generator=torch.Generator("cuda").manual_seed(34), device="cuda")[:num_tokens]
    cache = randn(500, 10, 2 * num_kv_heads * 128, seed=35)
    sizes = {"num_kv_heads": num_kv_heads, "head_size": 128, "norms": norms}
    expected_cache, results = cache.clone(), []
    wide = (qkv_TX.float(), cos_TP.float(), sin_TP.float(), expected_cache.float())
    wide_norms = HeadNorms(norms.q_weight_Q.float(), norms.k_weight_Q.float(), 1e-6)
    expected = norm_rotate_write.reference(*wide, slots_T, **{**sizes, "norms": wide_norms})
    for source_TX in (qkv_TX.clone(), qkv_TX.clone()):
        with no_waiting() if results else nullcontext():
            results.append(norm_rotate_write(source_TX, cos_TP, sin_TP, cache, slots_T, **sizes))
    for actual, again, expected_x in zip(*results, expected, strict=True):
        assert relative_error(actual, expected_x) < 1e-2
        torch.testing.assert_close(actual.float(), expected_x, rtol=3e-2, atol=0.2)
        assert torch.equal(actual, again)
    assert relative_error(cache, wide[3]) < 1e-2
    others = torch.ones(5000, dtype=torch.bool, device="cuda").index_fill_(0, slots_T, False)
    assert torch.equal(cache.flatten(0, 1)[others], expected_cache.flatten(0, 1)[others])


def test_packing() -> None:
    """Rows as transports make them, whose ends are no multiple of 16 bytes."""
    x_RD, ids_RK, weights_RK = packed_rows(3000, 2048, 6, 64, BFLOAT16, seed=36)
    x_TD, weights_TK = randn(3000, 2048, seed=37), randn(3000, 6, seed=38, dtype=torch.float32)
    ids_TK = weights_TK.argsort(1)
    pack_rows(x_RD, weights_RK, ids_RK, x_TD, weights_TK, ids_TK)
    assert torch.equal(x_RD, x_TD)
    assert torch.equal(weights_RK, weights_TK)
    assert torch.equal(ids_RK.to(torch.int64), ids_TK)


@pytest.mark.parametrize("num_parts", [2, 3, 8, 17])
def test_sums_of_ranks(num_parts: int) -> None:
    parts = [randn(333, 2048, seed=seed) for seed in range(num_parts)]
    sum_TD = run_without_waiting(lambda: add_in_rank_order(parts))
    assert torch.equal(sum_TD, add_parts.reference(*parts))


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_groups", "top_groups", "scoring"),
    [(256, 8, 8, 4, Scoring.SIGMOID), (160, 6, 8, 3, Scoring.SOFTMAX), (64, 6, 8, 7, Scoring.SIGMOID)],
)
def test_choice_in_groups(num_experts: int, top_k: int, num_groups: int, top_groups: int, scoring: Scoring) -> None:
    """Where two scores differ only in the last bit, the device may choose the other expert."""
    best = 2 if scoring is Scoring.SIGMOID else 1
    limit = GroupLimit(num_groups=num_groups, top_groups=top_groups, best_of_group=best)
    bias_E = randn(num_experts, seed=41, dtype=torch.float32) / 10 if scoring is Scoring.SIGMOID else None
    for num_tokens in (1000, 1):
        logits_TE = randn(num_tokens, num_experts, seed=42, dtype=torch.float32)
        num_real_1 = torch.tensor([num_tokens - num_tokens // 5], device="cuda")
        options = {"bias_E": bias_E, "normalize": True, "limit": limit, "num_real_1": num_real_1}

        def choose(logits_TE=logits_TE, options=options):  # type: ignore[no-untyped-def]
            return choose_experts(logits_TE, top_k, scoring, **options)

        choose()
        with no_waiting():
            ids_TK, weights_TK = choose()
        expected_ids_TK, expected_TK = choose_experts.reference(logits_TE, top_k, scoring, **options)
        assert (ids_TK != expected_ids_TK).any(1).sum() <= num_tokens // 200
        same = (ids_TK == expected_ids_TK).all(1)
        torch.testing.assert_close(weights_TK[same], expected_TK[same], rtol=1e-5, atol=1e-7)


def test_logits_of_a_router_are_not_rounded() -> None:
    config = RoutingConfig(scores=Scoring.SOFTMAX, num_experts=128, top_k=8, normalize=True)
    router = Router(2048, config, dtype=BFLOAT16).cuda()
    router.weight.copy_(randn(128, 2048, seed=39) / 45)
    for num_tokens in (1000, 1, 0):
        x_TD = randn(num_tokens, 2048, seed=40)
        logits_TE = router._logits(x_TD)
        assert logits_TE.dtype == torch.float32
        expected_TE = x_TD.double() @ router.weight.double().t()
        torch.testing.assert_close(logits_TE.double(), expected_TE, rtol=1e-4, atol=1e-4)
