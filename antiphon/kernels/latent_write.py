"""From latent attention's projection to latents with rotary keys, in the paged cache too.

The fused twin does the norm of the latents, the rotary embedding of the keys and the cache write in one pass.

Shapes: `T` tokens, `C` latent size, `P` pairs of rotary dimensions, `X` = C + 2P.
"""

from __future__ import annotations

import torch

from antiphon.kernels.dispatch import fused
from antiphon.kernels.mla_attention import write_latents
from antiphon.kernels.norm_rope import apply_rope, rms_norm


@fused("latent_write", one_dtype=("latent_TX", "weight_C", "cos_TP", "sin_TP", "cache_blocks"))
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
    """Latents [T, C + 2P] in the cache's format, new and contiguous; also writes them to the cache.

    latent_TX: may have gaps between rows. interleaved: see `apply_rope`; the norm is `rms_norm`.
    cache_blocks: [num_blocks, block_size, C + 2P], contiguous.
    slots_T: int64, block * block_size + offset, all distinct except those in block 0.
    """
    size = weight_C.shape[0]
    rotary = apply_rope.reference(latent_TX[:, size:], cos_TP, sin_TP, interleaved=interleaved)
    out_TX = torch.cat([rms_norm.reference(latent_TX[:, :size], weight_C, eps), rotary], dim=-1)
    write_latents(cache_blocks, slots_T, out_TX)
    return out_TX
