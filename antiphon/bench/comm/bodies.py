"""The computation beside an exchange: grouped GEMMs, a dense GEMM, causal attention.

A body computes any number of units, `UNITS` per launch and the rest in a smaller launch, so that its duration can be
matched to an exchange. Inputs are created once; results are discarded.

Shapes: `X` rows, `E` experts, `D` hidden size, `N` outputs, `H` heads, `S` tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from antiphon.device.table import device_of
from antiphon.kernels.grouped_experts import grouped_product

UNITS = 16
"""Units per full launch."""


@dataclass(frozen=True, slots=True)
class Body:
    """`launch(units)` queues 1 to `UNITS` units on the current stream."""

    name: str
    size: str  # of one full launch, for the result
    launch: Callable[[int], object]

    def run(self, units: int) -> None:
        """Queue any number of units."""
        whole, rest = divmod(units, UNITS)
        for _ in range(whole):
            self.launch(UNITS)
        if rest:
            self.launch(rest)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes of a full launch."""

    grouped: tuple[int, int, int, int]  # X, E, D, N
    dense: tuple[int, int, int]  # X, D, N
    attention: tuple[int, int, int]  # H, S, size of a head


# Large enough to fill a GPU. The grouped product is the first of an expert layer with 128 experts on two ranks, top-8,
# 8192 tokens per rank, D = 2048, width 768.
_GPU = _Sizes(grouped=(65536, 64, 2048, 1536), dense=(16384, 4096, 4096), attention=(64, 4096, 128))
_CPU = _Sizes(grouped=(128, 4, 64, 64), dense=(128, 64, 64), attention=(16, 32, 16))


def make_body(name: str, device: torch.device, *, seed: int = 0) -> Body:
    """The named body on `device`: in bfloat16, or small and in float32 on the CPU."""
    owner = device_of(device)
    sizes, dtype = _GPU if owner.own_memory else _CPU, owner.default_dtype
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    return _MAKERS[name](sizes, random)


_Random = Callable[..., torch.Tensor]


def _grouped(sizes: _Sizes, random: _Random) -> Body:
    num_rows, num_experts, hidden, outputs = sizes.grouped
    x_XD = random(num_rows, hidden)
    weight_END = random(num_experts, outputs, hidden) * hidden**-0.5
    counts_E = torch.arange(1, num_experts + 1, device=x_XD.device, dtype=torch.int32)
    ends_by_units = {units: counts_E * (num_rows * units // UNITS // num_experts) for units in range(1, UNITS + 1)}

    def launch(units: int) -> torch.Tensor:
        return grouped_product(x_XD[: num_rows * units // UNITS], weight_END, ends_by_units[units])

    return Body("grouped", f"{num_rows} rows over {num_experts} experts [{outputs}, {hidden}]", launch)


def _dense(sizes: _Sizes, random: _Random) -> Body:
    num_rows, hidden, outputs = sizes.dense
    x_XD = random(num_rows, hidden)
    weight_ND = random(outputs, hidden) * hidden**-0.5

    def launch(units: int) -> torch.Tensor:
        return F.linear(x_XD[: num_rows * units // UNITS], weight_ND)

    return Body("dense", f"{num_rows} rows, [{outputs}, {hidden}]", launch)


def _attention(sizes: _Sizes, random: _Random) -> Body:
    num_heads, num_tokens, head_size = sizes.attention
    q, k, v = (random(1, num_heads, num_tokens, head_size) for _ in range(3))

    def launch(units: int) -> torch.Tensor:
        heads = num_heads * units // UNITS
        return F.scaled_dot_product_attention(q[:, :heads], k[:, :heads], v[:, :heads], is_causal=True)

    return Body("attention", f"causal, {num_heads} heads of {head_size}, {num_tokens} tokens", launch)


_MAKERS: dict[str, Callable[[_Sizes, _Random], Body]] = {"grouped": _grouped, "dense": _dense, "attention": _attention}

BODY_NAMES = tuple(_MAKERS)
