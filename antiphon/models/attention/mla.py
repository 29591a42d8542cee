"""Multi-head latent attention (DeepSeek-V2 paper, section 2.1) over the paged latent cache.

Shapes: `T` tokens, `D` hidden size, `H` heads, `C` latent size, `P2` rotary dimensions, `Q` dimensions of a head
without rotary, `V` value dimensions, `P` pairs of rotary dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from antiphon.core.batch import DecodeGroup, PrefillSlice, current_micro_batch
from antiphon.kernels.attention import AttentionBackend, AttentionShape
from antiphon.kernels.latent_write import norm_rotate_write_latents
from antiphon.kernels.mla_attention import expand_output, fold_query, prefill_attention
from antiphon.kernels.norm_rope import apply_rope
from antiphon.kernels.paged_cache import gather_blocks
from antiphon.models.attention.paged import attend
from antiphon.models.attention.rope import RopeConfig, score_scale
from antiphon.models.config import ConfigFile
from antiphon.models.layers import Linear, MergedLinear, RMSNorm
from antiphon.runtime import order_point

_LATENT_NORM_EPS = 1e-6  # not in the checkpoint's config; DeepSeek and transformers use this


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionConfig:
    """Sizes of one attention layer."""

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

    @property
    def shape(self) -> AttentionShape:
        """The shape for decoding requests, whose queries and results are in latent space."""
        return AttentionShape(
            num_heads=self.num_heads,
            num_kv_heads=1,
            key_size=self.kv_width,
            value_size=self.latent_size,
            scale=score_scale(self.rope, self.head_size),
            latent=True,
        )

    @staticmethod
    def read(file: ConfigFile, *, interleaved: bool) -> LatentAttentionConfig:
        """Read the sizes. Raises `ModelError` for those that are missing or wrong."""
        rope_size = file.count("qk_rope_head_dim")
        if rope_size % 2:
            raise file.fault(
                "qk_rope_head_dim", rope_size, remedy="use an even number, because dimensions rotate in pairs"
            )
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

    def __init__(
        self, config: LatentAttentionConfig, layer: int, backend: AttentionBackend, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.backend = backend
        self.scale = config.shape.scale
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
        config, metadata = self.config, current_micro_batch().attention
        first_TX, latent_TC = self.first_proj.split(self.first_proj.forward(x_TD))
        latent_TC = norm_rotate_write_latents(
            latent_TC,
            self.kv_a_layernorm.weight,
            self.kv_a_layernorm.eps,
            cos_TP,
            sin_TP,
            self.cache_blocks,
            metadata.slots_T,
            interleaved=config.rope.interleaved,
        )
        q_THQ = self._queries(first_TX, cos_TP, sin_TP)
        order_point(("keys and values", self.layer))

        out_TX = attend(
            metadata,
            q_THQ,
            latent_TC,
            width=self.o_proj.weight.shape[1],
            prefill=self._prefill,
            decode=partial(self._decode, metadata.prepared),
        )
        return self.o_proj.forward(out_TX)

    @property
    def _up_HXC(self) -> torch.Tensor:
        """[H, Q + V, C], from a latent to the key and the value of each head."""
        return self.kv_b_proj.weight.view(self.config.num_heads, -1, self.config.latent_size)

    def _prefill(
        self, q_NSHQ: torch.Tensor, latents_NLC: torch.Tensor, with_context: PrefillSlice | None
    ) -> torch.Tensor:
        if with_context is not None:
            latents_LC = gather_blocks(self.cache_blocks, with_context.block_ids_B, with_context.length)
            latents_NLC = latents_LC.unsqueeze(0)
        return prefill_attention(q_NSHQ, latents_NLC, self._up_HXC, self.scale)

    def _decode(self, prepared: Any, q_NHQ: torch.Tensor, decodes: DecodeGroup) -> torch.Tensor:
        sizes = [self.config.query_size, self.config.value_size]
        key_up_HQC, value_up_HVC = torch.split(self._up_HXC, sizes, dim=1)
        folded_NHX = fold_query(q_NHQ, key_up_HQC)
        table_NB, seq_lens_N = decodes.block_table_NB, decodes.seq_lens_N
        out_NHC = self.backend.decode(folded_NHX, self.cache_blocks, table_NB, seq_lens_N, prepared)
        return expand_output(out_NHC, value_up_HVC)

    def _queries(self, first_TX: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
        """Queries [T, H, Q + P2], rotary part last. first_TX: the queries, or their low-rank bottleneck."""
        config = self.config
        q_TX = first_TX if config.query_rank is None else self.q_b_proj.forward(self.q_a_layernorm.forward(first_TX))
        q_THQ = q_TX.view(-1, config.num_heads, config.head_size)
        rotary = q_THQ[..., config.query_size :]
        apply_rope(rotary, cos_TP, sin_TP, interleaved=config.rope.interleaved, out=rotary)
        return q_THQ
