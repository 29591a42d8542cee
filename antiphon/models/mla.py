"""Multi-head latent attention (DeepSeek-V2 paper, section 2.1) over the paged latent cache.

Shapes: `T` tokens, `D` hidden size, `H` heads, `C` latent size, `P2` rotary dimensions, `Q` dimensions of a head
without rotary, `V` value dimensions, `P` pairs of rotary dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from antiphon.core.batch import current_micro_batch
from antiphon.core.errors import ModelError
from antiphon.kernels.mla_attention import decode_attention, gather_blocks, prefill_attention, write_latents
from antiphon.kernels.norm_rope import apply_rope
from antiphon.models.config import ConfigFile
from antiphon.models.layers import Linear, MergedLinear, RMSNorm
from antiphon.models.rope import RopeConfig, score_scale
from antiphon.runtime import order_point

__all__ = ["LatentAttention", "LatentAttentionConfig"]

_LATENT_NORM_EPS = 1e-6  # not in the checkpoint's config; DeepSeek and transformers use this


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionConfig:
    """Sizes of the attention of one layer."""

    hidden_size: int
    num_heads: int
    query_rank: int | None  # None: the query has no low-rank bottleneck
    latent_size: int
    query_size: int  # Q
    value_size: int  # V
    bias: bool
    rope: RopeConfig

    @property
    def head_size(self) -> int:
        return self.query_size + self.rope.size

    @property
    def kv_width(self) -> int:
        return self.latent_size + self.rope.size

    @staticmethod
    def read(file: ConfigFile, *, interleaved: bool) -> LatentAttentionConfig:
        """Raises `ModelError` for sizes that are missing or wrong."""
        rope_size = file.count("qk_rope_head_dim")
        if rope_size % 2:
            raise ModelError(f"{file.path} has qk_rope_head_dim={rope_size}; pairs need an even number")
        return LatentAttentionConfig(
            hidden_size=file.count("hidden_size"),
            num_heads=file.count("num_attention_heads"),
            query_rank=None if file.get("q_lora_rank") is None else file.count("q_lora_rank"),
            latent_size=file.count("kv_lora_rank"),
            query_size=file.count("qk_nope_head_dim"),
            value_size=file.count("v_head_dim"),
            bias=file.flag("attention_bias", False),
            rope=RopeConfig.read(file, size=rope_size, interleaved=interleaved),
        )


class LatentAttention(nn.Module):
    """Attention of one layer. The engine sets `cache_blocks` [num_blocks, block_size, C + P2] before the first step."""

    cache_blocks: torch.Tensor

    def __init__(self, config: LatentAttentionConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.scale = score_scale(config.rope, config.head_size)
        query_width = config.num_heads * config.head_size
        latents = "kv_a_proj_with_mqa"
        if config.query_rank is None:
            first_sizes = {"q_proj": query_width, latents: config.kv_width}
            with_bias = [latents]
        else:
            first_sizes = {"q_a_proj": config.query_rank, latents: config.kv_width}
            with_bias = list(first_sizes)
            self.q_a_layernorm = RMSNorm(config.query_rank, eps=_LATENT_NORM_EPS, dtype=dtype)
            self.q_b_proj = Linear(config.query_rank, query_width, dtype=dtype)
        self.first_proj = MergedLinear(
            config.hidden_size, first_sizes, dtype=dtype, with_bias=with_bias if config.bias else ()
        )
        self.kv_a_layernorm = RMSNorm(config.latent_size, eps=_LATENT_NORM_EPS, dtype=dtype)
        self.kv_b_proj = Linear(
            config.latent_size, config.num_heads * (config.query_size + config.value_size), dtype=dtype
        )
        self.o_proj = Linear(config.num_heads * config.value_size, config.hidden_size, dtype=dtype, bias=config.bias)

    def forward(self, x_TD: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
        metadata = current_micro_batch().attention
        first_TX, latent_TC = self.first_proj.split(self.first_proj(x_TD))
        q_THQ = self._queries(first_TX, cos_TP, sin_TP)
        latent_TC = self._latents(latent_TC, cos_TP, sin_TP)
        write_latents(self.cache_blocks, metadata.slots_T, latent_TC)
        order_point(("keys and values", self.layer))

        key_up_HQC, value_up_HVC = self._up_projections()
        out_THV = q_THQ.new_empty(x_TD.shape[0], self.config.num_heads, self.config.value_size)
        for prefill in metadata.prefills:
            rows = slice(prefill.start, prefill.stop)
            latents_LC = latent_TC[rows]
            if prefill.context_len > 0:
                length = prefill.context_len + prefill.stop - prefill.start
                latents_LC = gather_blocks(self.cache_blocks, prefill.block_ids_B, length)
            out_THV[rows] = prefill_attention(q_THQ[rows], latents_LC, key_up_HQC, value_up_HVC, self.scale)
        if (decodes := metadata.decodes) is not None:
            out_THV[decodes.rows_N] = decode_attention(
                q_THQ[decodes.rows_N],
                self.cache_blocks,
                decodes.block_table_NB,
                decodes.seq_lens_N,
                key_up_HQC,
                value_up_HVC,
                self.scale,
            )
        out_TD: torch.Tensor = self.o_proj(out_THV.flatten(1))
        return out_TD

    def _queries(self, first_TX: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
        """[T, H, Q + P2], rotary part behind. first_TX: the queries, or their bottleneck."""
        config = self.config
        q_TX = first_TX if config.query_rank is None else self.q_b_proj(self.q_a_layernorm(first_TX))
        q_THQ: torch.Tensor = q_TX.view(-1, config.num_heads, config.head_size)
        rotary = q_THQ[..., config.query_size :]
        apply_rope(rotary, cos_TP, sin_TP, interleaved=config.rope.interleaved, out=rotary)
        return q_THQ

    def _latents(self, latent_TC: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
        """[T, C + P2]: what the cache keeps of each token."""
        config = self.config
        latent_TC, rotary = torch.split(latent_TC, [config.latent_size, config.rope.size], dim=-1)
        rotary = apply_rope(rotary, cos_TP, sin_TP, interleaved=config.rope.interleaved)
        return torch.cat([self.kv_a_layernorm(latent_TC), rotary], dim=-1)

    def _up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """From a latent to the keys [H, Q, C] and values [H, V, C] of every head: views."""
        config = self.config
        up_HXC = self.kv_b_proj.weight.view(config.num_heads, -1, config.latent_size)
        return up_HXC[:, : config.query_size], up_HXC[:, config.query_size :]
