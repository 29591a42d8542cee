"""Grouped-query attention over the paged cache of keys and values.

Shapes: `T` tokens, `D` hidden size, `H` query heads, `G` key/value heads, `Q` dimensions of a head, `N` requests
of the same length, `S` new tokens and `L` tokens of context and new ones of each, `P` pairs of rotary dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from antiphon.core.batch import PrefillSlice, current_micro_batch
from antiphon.core.errors import ModelError
from antiphon.kernels.gqa_attention import decode_attention, gather_keys_values, prefill_attention, write_keys_values
from antiphon.kernels.norm_rope import apply_rope
from antiphon.models.config import ConfigFile
from antiphon.models.layers import Linear, MergedLinear, RMSNorm
from antiphon.models.rope import RopeConfig, rotary_size
from antiphon.runtime import order_point

__all__ = ["GroupedQueryAttention", "GroupedQueryConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQueryConfig:
    """Sizes of the attention of one layer."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    bias: bool  # of the projections to queries, keys and values
    out_bias: bool
    qk_norm_eps: float | None  # None: queries and keys are not normalised
    rope: RopeConfig  # of the first dimensions of a head, or of all

    @property
    def kv_width(self) -> int:
        return 2 * self.num_kv_heads * self.head_size

    @staticmethod
    def read(file: ConfigFile, *, qk_norm: bool, out_bias: bool, rotary_share: float) -> GroupedQueryConfig:
        """rotary_share: of the dimensions of a head, where the file does not say. Raises `ModelError`."""
        hidden_size, num_heads = file.count("hidden_size"), file.count("num_attention_heads")
        num_kv_heads = file.count("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise ModelError(
                f"{file.path} has num_attention_heads={num_heads}, num_key_value_heads={num_kv_heads}; "
                "the first must be a multiple of the second"
            )
        head_size = hidden_size // num_heads if file.get("head_dim") is None else file.count("head_dim")
        size = rotary_size(file, head_size, default_share=rotary_share)
        return GroupedQueryConfig(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            bias=file.flag("attention_bias", False),
            out_bias=out_bias,
            qk_norm_eps=file.number("rms_norm_eps", 1e-6) if qk_norm else None,
            rope=RopeConfig.read(file, size=size, interleaved=False),
        )


class GroupedQueryAttention(nn.Module):
    """Attention of one layer. The engine sets `cache_blocks` [num_blocks, block_size, 2GQ] before the first step."""

    cache_blocks: torch.Tensor

    def __init__(self, config: GroupedQueryConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.scale = config.head_size**-0.5
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
        q_THQ, key_TGQ, value_TGQ = self._projections(x_TD, cos_TP, sin_TP)
        write_keys_values(self.cache_blocks, metadata.slots_T, key_TGQ, value_TGQ)
        order_point(("keys and values", self.layer))

        out_THQ = q_THQ.new_empty(q_THQ.shape)
        for run in _runs(metadata.prefills):
            rows, per_request = slice(run[0].start, run[-1].stop), (len(run), -1)
            key_LGQ, value_LGQ = key_TGQ[rows], value_TGQ[rows]
            if run[0].context_len > 0:
                length = run[0].context_len + run[0].stop - run[0].start
                key_LGQ, value_LGQ = gather_keys_values(
                    self.cache_blocks, run[0].block_ids_B, length, self.config.head_size
                )
            out_NSHQ = prefill_attention(
                torch.unflatten(q_THQ[rows], 0, per_request),
                torch.unflatten(key_LGQ, 0, per_request),
                torch.unflatten(value_LGQ, 0, per_request),
                self.scale,
            )
            out_THQ[rows] = out_NSHQ.flatten(0, 1)
        if (decodes := metadata.decodes) is not None:
            out_THQ[decodes.rows_N] = decode_attention(
                q_THQ[decodes.rows_N], self.cache_blocks, decodes.block_table_NB, decodes.seq_lens_N, self.scale
            )
        out_TD: torch.Tensor = self.o_proj(out_THQ.flatten(1))
        return out_TD

    def _projections(
        self, x_TD: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, H, Q], keys and values [T, G, Q]."""
        config = self.config
        q_TX, key_TX, value_TX = self.qkv_proj.split(self.qkv_proj(x_TD))
        q_THQ = q_TX.view(-1, config.num_heads, config.head_size)
        key_TGQ = key_TX.view(-1, config.num_kv_heads, config.head_size)
        value_TGQ = value_TX.view(-1, config.num_kv_heads, config.head_size)
        if self.q_norm is not None and self.k_norm is not None:
            q_THQ, key_TGQ = self.q_norm(q_THQ), self.k_norm(key_TGQ)
        for x_TXQ in (q_THQ, key_TGQ):
            rotary = x_TXQ[..., : config.rope.size]
            apply_rope(rotary, cos_TP, sin_TP, interleaved=False, out=rotary)
        return q_THQ, key_TGQ, value_TGQ


def _runs(prefills: Sequence[PrefillSlice]) -> Iterator[list[PrefillSlice]]:
    """Slices that one call of attention can take: neighbours of the same length without context, or one alone."""
    run: list[PrefillSlice] = []
    for prefill in prefills:
        if run and not _alike(run[-1], prefill):
            yield run
            run = []
        run.append(prefill)
    if run:
        yield run


def _alike(first: PrefillSlice, second: PrefillSlice) -> bool:
    same_length = first.stop - first.start == second.stop - second.start
    return same_length and first.stop == second.start and first.context_len == second.context_len == 0
