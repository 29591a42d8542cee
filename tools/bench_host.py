"""Host time of each piece of a layer on one CUDA device: how long the host takes to launch it.

    python -m tools.bench_host

The device is synchronized before each sample, and a sample is too short to fill the launch queue, so the host never
waits for the device. Prints a table, and one JSON object as the last line. Takes a few seconds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton

from antiphon.core.batch import AttentionMetadata, MicroBatch, PrefillSlice, use_micro_batch
from antiphon.kernels.activation import gated_silu
from antiphon.kernels.attention import choose_backend
from antiphon.kernels.fused.direct import find_driver
from antiphon.kernels.fused.norm_rope import _norm
from antiphon.kernels.gqa_attention import prefill_attention
from antiphon.kernels.gqa_write import HeadNorms, norm_rotate_write
from antiphon.kernels.grouped_experts import ExpertWorkspace, grouped_experts, grouped_product
from antiphon.kernels.norm_rope import add_rms_norm, rms_norm
from antiphon.kernels.pack import pack_rows
from antiphon.kernels.router import Scoring, choose_experts
from antiphon.models.attention.gqa import GroupedQueryAttention, GroupedQueryConfig
from antiphon.models.attention.rope import RopeConfig, rope_angles, rope_tables
from antiphon.models.checkpoint.dummy_routing import RouteTable, TableRouter
from antiphon.models.router import Router, RoutingConfig

# The shape of Qwen3-30B-A3B on two ranks, 4096 tokens per lane and rank
TOKENS, HIDDEN, HEADS, KV_HEADS, HEAD, EXPERTS, LOCAL, TOP_K, WIDTH = 4096, 2048, 32, 4, 128, 128, 64, 8, 768
PROMPT = 1024
ROUNDS, CALLS, WARMUPS = 12, 8, 3
BF16 = torch.bfloat16

Call = Callable[[], Any]


def main() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        times = {name: host_us(call) for name, call in pieces().items()}
    for name, (median, least) in times.items():
        print(f"{name:<44}{median:9.1f}{least:9.1f}  us, median and least")
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "direct_launches": find_driver() is not None,
        "host_us": {name: round(median, 2) for name, (median, _) in times.items()},
    }
    print(json.dumps(report))


def host_us(call: Call) -> tuple[float, float]:
    """Median and minimum time of one call."""
    for _ in range(WARMUPS):
        call()
    samples = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples), min(samples)


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def pieces() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    x_TD, residual_TD, weight_D = randn(TOKENS, HIDDEN), randn(TOKENS, HIDDEN), randn(HIDDEN)

    # ---- launches and small kernels
    out_TD = torch.empty_like(x_TD)
    launch = _norm(TOKENS, 1, HIDDEN, (HIDDEN, 0), None, 1e-6, False)
    calls["launch through Triton"] = lambda: launch._through_triton((x_TD, x_TD, weight_D, out_TD, out_TD))
    calls["launch, direct where possible"] = lambda: launch(x_TD, x_TD, weight_D, out_TD, out_TD)
    calls["torch: new_empty"] = lambda: x_TD.new_empty(TOKENS, HIDDEN)
    calls["torch: add"] = lambda: torch.add(x_TD, residual_TD)
    calls["rms_norm"] = lambda: rms_norm(x_TD, weight_D, 1e-6)
    calls["add_rms_norm"] = lambda: add_rms_norm(x_TD, residual_TD, weight_D, 1e-6)

    # ---- attention
    config = GroupedQueryConfig(
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=HEAD,
        bias=False,
        out_bias=False,
        qk_norm_eps=1e-6,
        rope=RopeConfig(size=HEAD, theta=1e6, interleaved=False, yarn=None),
    )
    backend, _ = choose_backend("auto", config.shape, BF16, 16, torch.device("cuda"))
    attention = GroupedQueryAttention(config, 0, backend, dtype=BF16).cuda()
    for weight in attention.parameters():
        weight.copy_(torch.randn_like(weight) / HIDDEN**0.5)
    attention.cache_blocks = torch.zeros(TOKENS // 16, 16, config.kv_width, dtype=BF16, device="cuda")
    slots_T = torch.arange(TOKENS, device="cuda")
    angles_P = rope_angles(config.rope).cuda()
    cos_TP, sin_TP = rope_tables(angles_P, slots_T % PROMPT, config.rope, BF16)
    part = micro_batch(slots_T)
    qkv_TX = attention.qkv_proj(x_TD)
    norms = HeadNorms(randn(HEAD), randn(HEAD), 1e-6)

    def write() -> tuple[torch.Tensor, ...]:
        return norm_rotate_write(
            qkv_TX,
            cos_TP,
            sin_TP,
            attention.cache_blocks,
            slots_T,
            num_kv_heads=KV_HEADS,
            head_size=HEAD,
            norms=norms,
        )

    q, key, value = (x.view(TOKENS // PROMPT, PROMPT, *x.shape[1:]) for x in write())

    def whole_attention() -> torch.Tensor:
        with use_micro_batch(part):
            return attention.forward(x_TD, cos_TP, sin_TP)

    calls["torch: linear to queries, keys, values"] = lambda: F.linear(x_TD, attention.qkv_proj.weight)
    calls["norm, rotate, write"] = write
    calls["prefill attention, one call"] = lambda: prefill_attention(q, key, value, HEAD**-0.5)
    calls["attention block"] = whole_attention

    # ---- router
    routing = RoutingConfig(scores=Scoring.SOFTMAX, num_experts=EXPERTS, top_k=TOP_K, normalize=True)
    router = Router(HIDDEN, routing, dtype=BF16).cuda()
    router.weight.copy_(randn(EXPERTS, HIDDEN) / HIDDEN**0.5)
    table = RouteTable(torch.rand(4096, EXPERTS, device="cuda").topk(TOP_K).indices)
    first, later = TableRouter(router, table), TableRouter(router, table)
    logits_TE = router._logits(x_TD)

    def by_table(layer: TableRouter) -> Call:
        def call() -> Any:
            with use_micro_batch(part):
                return layer.forward(x_TD)

        return call

    calls["router: logits"] = lambda: router._logits(x_TD)
    calls["router: choice"] = lambda: choose_experts(logits_TE, TOP_K, Scoring.SOFTMAX, normalize=True)
    calls["router"] = lambda: router.forward(x_TD)
    calls["router by table, first layer"] = by_table(first)
    calls["router by table, later layers"] = by_table(later)

    # ---- packing and experts
    routes = router.forward(x_TD)
    row_bytes = HIDDEN * 2 + TOP_K * 8
    rows = torch.zeros(2 * TOKENS, row_bytes, dtype=torch.uint8, device="cuda")
    x_RD = rows[:, : HIDDEN * 2].view(BF16)
    weights_RK = rows[:, HIDDEN * 2 : HIDDEN * 2 + TOP_K * 4].view(torch.float32)
    ids_RK = rows[:, HIDDEN * 2 + TOP_K * 4 :].view(torch.int32)
    packed = (x_RD[:TOKENS], weights_RK[:TOKENS], ids_RK[:TOKENS], x_TD, routes.weights_TK, routes.ids_TK)
    pack_rows(*packed)
    pack_rows(x_RD[TOKENS:], weights_RK[TOKENS:], ids_RK[TOKENS:], *packed[3:])
    gate_up_EGD, down_EDF = randn(LOCAL, 2 * WIDTH, HIDDEN) / 45, randn(LOCAL, HIDDEN, WIDTH) / 28
    workspace, out_RD = ExpertWorkspace(), torch.empty(2 * TOKENS, HIDDEN, dtype=BF16, device="cuda")
    pairs_XD, ends_E = randn(2 * TOKENS, HIDDEN), torch.arange(1, LOCAL + 1, dtype=torch.int32, device="cuda")
    calls["pack_rows"] = lambda: pack_rows(*packed)
    calls["pack_rows, three copies"] = lambda: pack_rows.reference(*packed)
    calls["one grouped product"] = lambda: grouped_product(pairs_XD, gate_up_EGD, ends_E)
    calls["gated_silu"] = lambda: gated_silu(gate_up_EGD[0])
    calls["experts"] = lambda: grouped_experts(
        x_RD, ids_RK, weights_RK, gate_up_EGD, down_EDF, out_RD=out_RD, first_expert=0, workspace=workspace
    )
    return calls


def micro_batch(slots_T: torch.Tensor) -> MicroBatch:
    """Prompts of the same length, without context."""
    block_ids_B = torch.arange(PROMPT // 16, device="cuda")
    prefills = tuple(
        PrefillSlice(start=start, stop=start + PROMPT, context_len=0, block_ids_B=block_ids_B)
        for start in range(0, TOKENS, PROMPT)
    )
    return MicroBatch(
        lane=0,
        requests=(),
        token_ids_T=slots_T,
        positions_T=slots_T,
        attention=AttentionMetadata(slots_T=slots_T, decodes=None, prefills=prefills),
        rows_by_rank=(TOKENS, TOKENS),
    )


if __name__ == "__main__":
    main()
