"""Norm, rotation and cache write of latents in one pass.

Shapes: as in `antiphon.kernels.latent_write`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up, is_double, power_of_two

_TILE_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_tokens"])
def _latent_write_kernel(
    latent_TX,
    weight_C,
    cos_TP,
    sin_TP,
    out_TX,
    cache,
    slots_T,
    num_tokens,
    stride_token,
    C: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    dtype: tl.constexpr = latent_TX.dtype.element_ty
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (tokens < num_tokens)[:, None]
    slots = tl.load(slots_T + tokens, mask=tokens < num_tokens, other=0)
    tokens = tokens.to(tl.int64)
    source = latent_TX + (tokens * stride_token)[:, None]
    target = out_TX + (tokens * (C + 2 * P))[:, None]
    cached = cache + (slots * (C + 2 * P))[:, None]

    columns = tl.arange(0, BLOCK_C)[None, :]
    real = inside & (columns < C)
    latent = tl.load(source + columns, mask=real, other=0).to(WIDE)
    scale = tl.rsqrt(tl.sum(latent * latent, 1) / C + EPS)[:, None]
    weight = tl.load(weight_C + columns, mask=columns < C, other=0).to(WIDE)
    # Rounded before the weight too, as in the reference.
    normed = ((latent * scale).to(dtype).to(WIDE) * weight).to(dtype)
    tl.store(target + columns, normed, mask=real)
    tl.store(cached + columns, normed, mask=real)

    pairs = tl.arange(0, BLOCK_P)[None, :]
    turn = inside & (pairs < P)
    if INTERLEAVED:
        first = tl.load(source + C + 2 * pairs, mask=turn, other=0).to(WIDE)
        second = tl.load(source + C + 2 * pairs + 1, mask=turn, other=0).to(WIDE)
    else:
        first = tl.load(source + C + pairs, mask=turn, other=0).to(WIDE)
        second = tl.load(source + C + P + pairs, mask=turn, other=0).to(WIDE)
    cos = tl.load(cos_TP + tokens[:, None] * P + pairs, mask=turn, other=0).to(WIDE)
    sin = tl.load(sin_TP + tokens[:, None] * P + pairs, mask=turn, other=0).to(WIDE)
    turned_first = (first * cos - second * sin).to(dtype)
    turned_second = (second * cos + first * sin).to(dtype)
    tl.store(target + C + pairs, turned_first, mask=turn)
    tl.store(target + C + P + pairs, turned_second, mask=turn)
    tl.store(cached + C + pairs, turned_first, mask=turn)
    tl.store(cached + C + P + pairs, turned_second, mask=turn)


@lru_cache(maxsize=NUM_SHAPES)
def _latent_write(
    num_tokens: int, stride_token: int, size: int, num_pairs: int, eps: float, interleaved: bool, double: bool
) -> Launch:
    block_c = power_of_two(size)
    block_t = max(1, _TILE_ELEMENTS // block_c)
    return Launch(
        _latent_write_kernel,
        (divide_up(num_tokens, block_t), 1),
        integers=(num_tokens, stride_token),
        constants={
            "C": size,
            "P": num_pairs,
            "EPS": eps,
            "INTERLEAVED": interleaved,
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
            "BLOCK_P": power_of_two(num_pairs),
            "DOUBLE": double,
        },
    )


def norm_rotate_write_latents_fused(
    latent_TX: torch.Tensor,
    weight_C: torch.Tensor,
    eps: float,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    cache_blocks: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    interleaved: bool,
) -> torch.Tensor:
    """See `norm_rotate_write_latents`."""
    num_tokens, width = latent_TX.shape
    assert latent_TX.stride(1) == 1 and cos_TP.is_contiguous() and sin_TP.is_contiguous() and slots_T.is_contiguous()
    assert cache_blocks.is_contiguous() and cache_blocks.shape[2] == width, "wrong cache shape"
    out_TX = latent_TX.new_empty(num_tokens, width)
    if num_tokens:
        launch = _latent_write(
            num_tokens,
            latent_TX.stride(0),
            weight_C.shape[0],
            cos_TP.shape[1],
            eps,
            interleaved,
            is_double(latent_TX.dtype),
        )
        launch(latent_TX, weight_C, cos_TP, sin_TP, out_TX, cache_blocks, slots_T)
    return out_TX
