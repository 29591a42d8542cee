"""Grouped-query attention over the paged cache of keys and values.

Shapes: `T` tokens, `D` hidden size, `H` query heads, `G` key/value heads, `Q` dimensions of a head, `N` requests
of the same length, `S` new tokens and `L` tokens of context and new ones of each, `P` pairs of rotary dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from antiphon.core.batch import DecodeGroup, PrefillSlice, current_micro_batch
from antiphon.kernels.attention import AttentionBackend, AttentionShape
from antiphon.kernels.gqa_attention import gather_keys_values, prefill_attention
from antiphon.kernels.gqa_write import HeadNorms, norm_rotate_write
from antiphon.models.attention.paged import attend
from antiphon.models.attention.rope import DEFAULT_THETA, RopeConfig, rotary_size
from antiphon.models.config import ConfigFile
from antiphon.models.layers import Linear, MergedLinear, RMSNorm
from antiphon.runtime import order_point


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQueryConfig:
    """Sizes of one attention layer."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    bias: bool  # of the projections to queries, keys and values
    out_bias: bool
    qk_norm_eps: float | None  # None: queries and keys are not normalized
    rope: RopeConfig  # of the first dimensions of a head, or of all

    @property
    def kv_width(self) -> int:
        return 2 * self.num_kv_heads * self.head_size

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            key_size=self.head_size,
            value_size=self.head_size,
            scale=self.head_size**-0.5,
            latent=False,
        )

    @staticmethod
    def read(
        file: ConfigFile,
        *,
        with_bias: bool,
        out_bias: bool,
        qk_norm_eps: float | None = None,
        default_share: float = 1.0,
        default_theta: float = DEFAULT_THETA,
    ) -> GroupedQueryConfig:
        """Read the sizes. Raises `ModelError` for those that are missing or wrong.

        default_share, default_theta: share and base of the rotary dimensions if the file has none.
        """
        hidden_size, num_heads = file.count("hidden_size"), file.count("num_attention_heads")
        num_kv_heads = file.count("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise file.fault(
                "num_attention_heads", num_heads, remedy=f"use a multiple of num_key_value_heads={num_kv_heads}"
            )
        head_size = hidden_size // num_heads if file.get("head_dim") is None else file.count("head_dim")
        size = rotary_size(file, head_size, default_share=default_share)
        return GroupedQueryConfig(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            bias=with_bias,
            out_bias=out_bias,
            qk_norm_eps=qk_norm_eps,
            rope=RopeConfig.read(file, size=size, interleaved=False, default_theta=default_theta),
        )

    def refuse_partial_rotation(self, file: ConfigFile) -> None:
        """Raise `ModelError` if only part of a head rotates, for architectures that rotate whole heads."""
        if self.rope.size != self.head_size:
            share = self.rope.size / self.head_size
            limit = f"{file.architecture} is supported with whole heads rotated"
            raise file.fault("partial_rotary_factor", share, limit=limit, remedy="use a model with a factor of 1")


class GroupedQueryAttention(nn.Module):
    """Attention of one layer. The engine sets `cache_blocks` [num_blocks, block_size, 2GQ] before the first step."""

    cache_blocks: torch.Tensor

    def __init__(
        self, config: GroupedQueryConfig, layer: int, backend: AttentionBackend, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.backend = backend
        self.scale = config.shape.scale
        query_width, kv_width = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        sizes = {"q_proj": query_width, "k_proj": kv_width, "v_proj": kv_width}
        self.qkv_proj = MergedLinear(config.hidden_size, sizes, dtype=dtype, with_bias=sizes if config.bias else ())
        self.o_proj = Linear(query_width, config.hidden_size, dtype=dtype, bias=config.out_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm_eps is not None:
            self.q_norm = RMSNorm(config.head_size, eps=config.qk_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_size, eps=config.qk_norm_eps, dtype=dtype)

    def forward(self, x_TD: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
        metadata = current_micro_batch().attention
        q_THQ, key_TGQ, value_TGQ = norm_rotate_write(
            self.qkv_proj.forward(x_TD),
            cos_TP,
            sin_TP,
            self.cache_blocks,
            metadata.slots_T,
            num_kv_heads=self.config.num_kv_heads,
            head_size=self.config.head_size,
            norms=self._norms(),
        )
        order_point(("keys and values", self.layer))

        out_TX = attend(
            metadata,
            q_THQ,
            key_TGQ,
            value_TGQ,
            width=self.o_proj.weight.shape[1],
            prefill=self._prefill,
            decode=partial(self._decode, metadata.prepared),
        )
        return self.o_proj.forward(out_TX)

    def _norms(self) -> HeadNorms | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    def _prefill(
        self,
        q_NSHQ: torch.Tensor,
        key_NLGQ: torch.Tensor,
        value_NLGQ: torch.Tensor,
        with_context: PrefillSlice | None,
    ) -> torch.Tensor:
        if with_context is not None and self.backend.takes_context:
            blocks_B, length = with_context.block_ids_B, with_context.length
            return self.backend.attend_context(q_NSHQ[0], self.cache_blocks, blocks_B, length).unsqueeze(0)
        if with_context is not None:
            key_LGQ, value_LGQ = gather_keys_values(
                self.cache_blocks, with_context.block_ids_B, with_context.length, self.config.head_size
            )
            key_NLGQ, value_NLGQ = key_LGQ.unsqueeze(0), value_LGQ.unsqueeze(0)
        return prefill_attention(q_NSHQ, key_NLGQ, value_NLGQ, self.scale)

    def _decode(self, prepared: Any, q_NHQ: torch.Tensor, decodes: DecodeGroup) -> torch.Tensor:
        return self.backend.decode(q_NHQ, self.cache_blocks, decodes.block_table_NB, decodes.seq_lens_N, prepared)
