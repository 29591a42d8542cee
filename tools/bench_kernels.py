"""Check the kernels of one MoE layer on a CUDA device against plain torch, then time them.

    python -m tools.bench_kernels benchmarks/results/kernels.json

Every sample is one call, timed on the device: the cache is flushed and the queue filled first, so that neither a warm
cache nor launch latency affects it. Host time is reported separately. Competing variants are interleaved. Prints a
table, and one JSON object as the last line, which is also written to the path. Takes a minute.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from antiphon.core.errors import first_line
from antiphon.kernels.activation import gated_silu
from antiphon.kernels.fused.activation import launch_gated_silu
from antiphon.kernels.fused.experts import add_up, place_pairs, spread_rows
from antiphon.kernels.grouped_experts import ExpertWorkspace, grouped_experts, grouped_product
from antiphon.kernels.norm_rope import add_rms_norm, apply_rope, rms_norm
from antiphon.kernels.router import Scoring, choose_experts

BF16 = torch.bfloat16
REPEATS = 15
WARMUPS = 3
SLEEP_CYCLES = 2_000_000  # about a millisecond: longer than the host needs to launch any of the calls
FLUSH_BYTES = 256 << 20  # more than the L2 cache

Call = Callable[[], Any]
Work = tuple[float, str]  # an amount, and the unit of 1e6 * amount per microsecond


def operations(amount: float) -> Work:
    return amount * 1e-12, "TFLOP/s"


def moved_bytes(amount: float) -> Work:
    return amount * 1e-9, "GB/s"


def main(path: Path) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        report: dict[str, Any] = {
            "date": str(date.today()),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "errors": check(),
            "times": {},
        }
        for name, error in report["errors"].items():
            print(f"relative error {name:<42} {error:.1e}")
        for measure_group in (experts, small_kernels, gqa_prefill, latent_prefill):
            report["times"].update(measure_group())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


# ---- samples


class Timer:
    """Device time and host time of competing calls."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def sample(self, call: Call) -> tuple[float, float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        start = time.perf_counter()
        call()
        host_s = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3, host_s * 1e6

    def compare(self, title: str, calls: dict[str, Call], work: dict[str, Work]) -> dict[str, Any]:
        """Median, minimum and maximum time of each call in microseconds, and its rate if the work is known.

        A call that fails is reported as failed: not every backend supports every shape.
        """
        print(f"\n{title}\n{'':<44}{'us':>9}{'least':>9}{'most':>9}{'host us':>9}")
        results: dict[str, Any] = {}
        ready: dict[str, Call] = {}
        for name, call in calls.items():
            try:
                for _ in range(WARMUPS):
                    call()
                torch.cuda.synchronize()
                ready[name] = call
            except (RuntimeError, ValueError, TypeError) as error:
                results[name] = {"failed": first_line(error)[:120]}
                print(f"{name:<44}  not possible: {results[name]['failed'][:60]}")
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
        for _ in range(REPEATS):
            for name, call in ready.items():
                samples[name].append(self.sample(call))
        for name, pairs in samples.items():
            device_us, host_us = [pair[0] for pair in pairs], statistics.median(pair[1] for pair in pairs)
            median = statistics.median(device_us)
            results[name] = {
                "us": round(median, 1),
                "least_us": round(min(device_us), 1),
                "most_us": round(max(device_us), 1),
                "host_us": round(host_us, 1),
            }
            rate = ""
            if name in work:
                amount, unit = work[name]
                results[name][unit] = round(amount / median * 1e6, 1)
                rate = f"  {results[name][unit]:8.0f} {unit}"
            print(f"{name:<44}{median:9.1f}{min(device_us):9.1f}{max(device_us):9.1f}{host_us:9.1f}{rate}")
        return {title: results}


# ---- experts: the Qwen3-30B shape on one of two ranks

HIDDEN, WIDTH, TOP_K, NUM_EXPERTS, NUM_LOCAL = 2048, 768, 8, 128, 64


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def expert_weights() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(NUM_LOCAL, 2 * WIDTH, HIDDEN) / HIDDEN**0.5, randn(NUM_LOCAL, HIDDEN, WIDTH) / WIDTH**0.5


def packed_rows(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of packed rows of bytes, as a slab has them: tokens, ids (int32, global, uniform), weights."""
    x_bytes = HIDDEN * 2
    rows = torch.full((num_rows, x_bytes + 8 * TOP_K), 255, dtype=torch.uint8, device="cuda")
    x_RD = rows[:, :x_bytes].view(BF16)
    weights_RK = rows[:, x_bytes : x_bytes + 4 * TOP_K].view(torch.float32)
    ids_RK = rows[:, x_bytes + 4 * TOP_K :].view(torch.int32)
    x_RD.copy_(randn(num_rows, HIDDEN))
    weights_RK.copy_(torch.rand(num_rows, TOP_K, device="cuda"))
    ids_RK.copy_(torch.rand(num_rows, NUM_EXPERTS, device="cuda").topk(TOP_K).indices)
    return x_RD, ids_RK, weights_RK


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check() -> dict[str, float]:
    """Relative errors against float32. Raises if one exceeds what bfloat16 explains."""
    errors = {}
    gate_up, down = expert_weights()
    wide = gate_up.float(), down.float()
    for num_rows in (1, 100, 5000):
        x_RD, ids_RK, weights_RK = packed_rows(num_rows)
        ids_RK[0, 0] = NUM_LOCAL  # so that even the single row has an expert here
        expected = grouped_experts.reference(x_RD.float(), ids_RK, weights_RK, *wide, first_expert=NUM_LOCAL)
        for max_pairs in (262_144, 3000):
            workspace = ExpertWorkspace(max_pairs=max_pairs)
            workspace.get("pairs", (num_rows * TOP_K * HIDDEN,), BF16, x_RD.device).fill_(float("nan"))
            out_RD = torch.full((num_rows, HIDDEN), float("nan"), dtype=BF16, device="cuda")
            grouped_experts(
                x_RD, ids_RK, weights_RK, gate_up, down, out_RD=out_RD, first_expert=NUM_LOCAL, workspace=workspace
            )
            errors[f"experts, {num_rows} rows, max_pairs={max_pairs}"] = relative_error(out_RD, expected)
    x_TD, weight_D = randn(1000, HIDDEN), randn(HIDDEN)
    errors["rms_norm"] = relative_error(
        rms_norm(x_TD, weight_D, 1e-6), rms_norm.reference(x_TD.float(), weight_D.float(), 1e-6)
    )
    normed_TD, sum_TD = add_rms_norm(x_TD, x_TD.flip(0), weight_D, 1e-6)
    errors["add_rms_norm"] = relative_error(
        normed_TD, rms_norm.reference(sum_TD.float(), weight_D.float(), 1e-6)
    ) + relative_error(sum_TD, x_TD + x_TD.flip(0))
    x_THQ, angles_TP = randn(1000, 36, 128), torch.rand(1000, 64, device="cuda") * 6
    cos_TP, sin_TP = angles_TP.cos().to(BF16), angles_TP.sin().to(BF16)
    for interleaved in (True, False):
        errors[f"rope, interleaved={interleaved}"] = relative_error(
            apply_rope(x_THQ, cos_TP, sin_TP, interleaved=interleaved),
            apply_rope.reference(x_THQ.float(), cos_TP.float(), sin_TP.float(), interleaved=interleaved),
        )
    logits_TE = torch.randn(1000, NUM_EXPERTS, device="cuda")
    ids_TK, weights_TK = choose_experts(logits_TE, TOP_K, Scoring.SOFTMAX)
    best = logits_TE.softmax(-1).topk(TOP_K)
    errors["router"] = relative_error(weights_TK, best.values)
    assert (ids_TK == best.indices).float().mean() > 0.999, "the router kernel chooses other experts than torch.topk"
    for name, error in errors.items():
        assert error < 1e-2, f"{name} is wrong: relative error {error}"  # false for nan too
    return errors


def experts() -> dict[str, Any]:
    gate_up, down = expert_weights()
    timer = Timer()
    times: dict[str, Any] = {}
    workspace = ExpertWorkspace()
    for num_rows in (16384, 8192, 2048, 256, 32):
        x_RD, ids_RK, weights_RK = packed_rows(num_rows)
        out_RD = torch.empty(num_rows, HIDDEN, dtype=BF16, device="cuda")
        places_RK, ends_E = place_pairs(ids_RK, NUM_LOCAL, ExpertWorkspace())
        num_pairs, num_local = places_RK.numel(), int(ends_E[-1])
        x_XD = torch.empty(num_pairs, HIDDEN, dtype=BF16, device="cuda")
        spread_rows(x_RD, places_RK, x_XD)
        gate_up_XG = grouped_product(x_XD, gate_up, ends_E)
        act_XF = torch.empty(num_pairs, WIDTH, dtype=BF16, device="cuda")
        launch_gated_silu(gate_up_XG, act_XF, ends_E)
        y_XD = grouped_product(act_XF, down, ends_E)
        exact_XD, exact_XF = x_XD[:num_local], act_XF[:num_local]
        scratch = ExpertWorkspace()

        def whole(kept: ExpertWorkspace | None, x=x_RD, ids=ids_RK, weights=weights_RK, out=out_RD) -> Call:  # type: ignore[no-untyped-def]
            return lambda: grouped_experts(x, ids, weights, gate_up, down, out_RD=out, workspace=kept)

        calls: dict[str, Call] = {
            "all": whole(workspace),
            "all, without a workspace": whole(None),
            "place": lambda: place_pairs(ids_RK, NUM_LOCAL, scratch),  # noqa: B023
            "spread": lambda: spread_rows(x_RD, places_RK, x_XD),  # noqa: B023
            "product up": lambda: grouped_product(x_XD, gate_up, ends_E),  # noqa: B023
            "product up, exact allocation": lambda: grouped_product(exact_XD, gate_up, ends_E),  # noqa: B023
            "gated silu": lambda: launch_gated_silu(gate_up_XG, act_XF, ends_E),  # noqa: B023
            "product down": lambda: grouped_product(act_XF, down, ends_E),  # noqa: B023
            "product down, exact allocation": lambda: grouped_product(exact_XF, down, ends_E),  # noqa: B023
            "add up": lambda: add_up(y_XD, places_RK, weights_RK, out_RD),  # noqa: B023
            "reference": lambda: grouped_experts.reference(x_RD, ids_RK, weights_RK, gate_up, down, out_RD=out_RD),  # noqa: B023
        }
        up = 4.0 * num_local * HIDDEN * WIDTH
        row_bytes = 2.0 * HIDDEN
        work = {
            "all": operations(1.5 * up),
            "all, without a workspace": operations(1.5 * up),
            "product up": operations(up),
            "product up, exact allocation": operations(up),
            "product down": operations(up / 2),
            "product down, exact allocation": operations(up / 2),
            "spread": moved_bytes(row_bytes * (num_rows + num_local)),
            "gated silu": moved_bytes(6.0 * WIDTH * num_local),
            "add up": moved_bytes(row_bytes * (num_rows + num_local)),
        }
        times.update(timer.compare(f"experts, {num_rows} rows, {num_local} pairs here", calls, work))
    return times


# ---- norm, rope, router


def small_kernels() -> dict[str, Any]:
    timer, tokens = Timer(), 8192
    x_TD, residual_TD, weight_D = randn(tokens, HIDDEN), randn(tokens, HIDDEN), randn(HIDDEN)
    qkv_THQ, head_weight = randn(tokens, 40, 128), randn(128)
    q_THQ, qk_THQ = qkv_THQ[:, :32], qkv_THQ[:, :36]
    angles_TP = torch.rand(tokens, 64, device="cuda") * 6
    cos_TP, sin_TP = angles_TP.cos().to(BF16), angles_TP.sin().to(BF16)
    logits_TE = torch.randn(tokens, NUM_EXPERTS, device="cuda")
    gate_up_XG = randn(tokens, 2 * 1408)
    calls: dict[str, Call] = {
        "rms_norm": lambda: rms_norm(x_TD, weight_D, 1e-6),
        "rms_norm, torch": lambda: F.rms_norm(x_TD, (HIDDEN,), weight_D, 1e-6),
        "rms_norm, reference": lambda: rms_norm.reference(x_TD, weight_D, 1e-6),
        "add_rms_norm": lambda: add_rms_norm(x_TD, residual_TD, weight_D, 1e-6),
        "add, then rms_norm": lambda: rms_norm(x_TD + residual_TD, weight_D, 1e-6),
        "rms_norm of 32 heads": lambda: rms_norm(q_THQ, head_weight, 1e-6),
        "rms_norm of 32 heads, torch": lambda: F.rms_norm(q_THQ, (128,), head_weight, 1e-6),
        "rope of 36 heads": lambda: apply_rope(qk_THQ, cos_TP, sin_TP, interleaved=False),
        "rope of 36 heads in place": lambda: apply_rope(qk_THQ, cos_TP, sin_TP, interleaved=False, out=qk_THQ),
        "rope of 36 heads, interleaved": lambda: apply_rope(qk_THQ, cos_TP, sin_TP, interleaved=True),
        "rope of 36 heads, reference": lambda: apply_rope.reference(qk_THQ, cos_TP, sin_TP, interleaved=False),
        "gated silu, 1408": lambda: gated_silu(gate_up_XG),
        "gated silu, 1408, reference": lambda: gated_silu.reference(gate_up_XG),
        "router, 8 of 128": lambda: choose_experts(logits_TE, TOP_K, Scoring.SOFTMAX, normalize=True),
        "router, softmax and topk of torch": lambda: logits_TE.softmax(-1).topk(TOP_K),
    }
    row = 2.0 * tokens * HIDDEN
    work = {
        "rms_norm": moved_bytes(2 * row),
        "add_rms_norm": moved_bytes(4 * row),
        "rms_norm of 32 heads": moved_bytes(4.0 * tokens * 32 * 128),
        "rope of 36 heads": moved_bytes(4.0 * tokens * 36 * 128),
        "rope of 36 heads in place": moved_bytes(4.0 * tokens * 36 * 128),
        "gated silu, 1408": moved_bytes(6.0 * tokens * 1408),
    }
    return timer.compare(f"norm, rope, router: {tokens} tokens", calls, work)


# ---- attention backends


def with_backend(backend: SDPBackend, call: Call) -> Call:
    def limited() -> Any:
        with sdpa_kernel(backend):
            return call()

    return limited


def compare_backends(title: str, calls: dict[str, Call], amount: float) -> dict[str, Any]:
    return Timer().compare(title, calls, dict.fromkeys(calls, operations(amount)))


def gqa_prefill() -> dict[str, Any]:
    """Four requests of 2048 tokens, 32 query heads, 4 key heads of 128: the qkv of a fused projection."""
    requests, length, heads, kv_heads, size = 4, 2048, 32, 4, 128
    qkv = randn(requests, length, heads + 2 * kv_heads, size)
    q, k, v = (part.transpose(1, 2) for part in qkv.split([heads, kv_heads, kv_heads], dim=2))
    half = length // 2
    mask = causal_lower_right(half, length)

    def grouped() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def repeated() -> torch.Tensor:
        wide_k, wide_v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
        return F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True)

    def request_by_request() -> None:
        for i in range(requests):
            one = slice(i, i + 1)
            F.scaled_dot_product_attention(q[one], k[one], v[one], is_causal=True, enable_gqa=True)

    def behind_a_context() -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, half:], k, v, attn_mask=mask, enable_gqa=True)

    calls: dict[str, Call] = {"gqa, torch chooses": grouped}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        calls[f"gqa, {name}"] = with_backend(backend, grouped)
        calls[f"gqa, {name}, repeated keys"] = with_backend(backend, repeated)
        calls[f"gqa, {name}, request by request"] = with_backend(backend, request_by_request)
    scores = requests * heads * length * length / 2
    times = compare_backends("gqa prefill, 4 x 2048, 32 of 4 heads", calls, 4.0 * scores * size)
    context_calls = {
        "context, torch chooses": behind_a_context,
        "context, flash": with_backend(SDPBackend.FLASH_ATTENTION, behind_a_context),
    }
    title = "gqa prefill, the last 1024 of 4 x 2048"
    return {**times, **compare_backends(title, context_calls, 3.0 * scores * size)}


def latent_prefill() -> dict[str, Any]:
    """Four requests of 2048 tokens, 16 heads, keys of 192 and values of 128, as they leave the up-projections."""
    requests, length, heads, size, value_size = 4, 2048, 16, 192, 128
    q, k = randn(requests, length, heads, size).transpose(1, 2), randn(requests, heads, length, size)
    v = randn(requests, heads, length, value_size)

    def plain() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def values_padded() -> torch.Tensor:
        wide_v = F.pad(v, (0, size - value_size))
        return F.scaled_dot_product_attention(q, k, wide_v, is_causal=True)[..., :value_size]

    calls: dict[str, Call] = {"mla, torch chooses": plain, "mla, torch chooses, padded values": values_padded}
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for name, backend in backends.items():
        calls[f"mla, {name}"] = with_backend(backend, plain)
        calls[f"mla, {name}, padded values"] = with_backend(backend, values_padded)
    scores = requests * heads * length * length / 2
    title = "latent prefill, 4 x 2048, 16 heads of 192 and 128"
    return compare_backends(title, calls, 2.0 * scores * (size + value_size))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.bench_kernels RESULTS.json")
    main(Path(sys.argv[1]))
