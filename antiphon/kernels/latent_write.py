"""From the projection of latent attention to latents with their rotary keys, and into the paged cache.

On a CUDA device one pass: norm of the latents, rotary embedding of the keys, and the write.

Shapes: `T` tokens, `C` latent size, `P` pairs of rotary dimensions, `X` = C + 2P.
"""

from __future__ import annotations

import torch

from antiphon.kernels.mla_attention import write_latents
from antiphon.kernels.norm_rope import apply_rope_reference, rms_norm_reference
from antiphon.kernels.slow import warn_of_reference


def norm_rotate_write_latents(
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
    """Latents [T, C + 2P] as the cache keeps them, new and contiguous; the cache has them after it.

    latent_TX: may have gaps between rows. interleaved: see `apply_rope`; the norm is `rms_norm`.
    cache_blocks: [num_blocks, block_size, C + 2P], contiguous.
    slots_T: int64, block * block_size + offset, all different.
    """
    if latent_TX.is_cuda and latent_TX.dtype == weight_C.dtype == cos_TP.dtype == sin_TP.dtype == cache_blocks.dtype:
        from antiphon.kernels.fused.latent_write import norm_rotate_write_latents_fused  # Triton comes with CUDA only

        write = norm_rotate_write_latents_fused
    else:
        if latent_TX.is_cuda:
            warn_of_reference("norm_rotate_write_latents", latent_TX, weight_C, cos_TP, sin_TP, cache_blocks)
        write = norm_rotate_write_latents_reference
    return write(latent_TX, weight_C, eps, cos_TP, sin_TP, cache_blocks, slots_T, interleaved=interleaved)


def norm_rotate_write_latents_reference(
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
    """The same in plain torch."""
    size = weight_C.shape[0]
    rotary = apply_rope_reference(latent_TX[:, size:], cos_TP, sin_TP, interleaved=interleaved)
    out_TX = torch.cat([rms_norm_reference(latent_TX[:, :size], weight_C, eps), rotary], dim=-1)
    write_latents(cache_blocks, slots_T, out_TX)
    return out_TX
