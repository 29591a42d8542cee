"""Our own kernels: the cache is read once and where it lies, and results do not depend on the batch."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from antiphon.kernels.attention.base import AttentionBackend, AttentionShape
from antiphon.kernels.attention.needs import block_refusal, device_refusal

if TYPE_CHECKING:
    from antiphon.kernels.fused.attention_items import ItemList
    from antiphon.kernels.fused.paged_gqa import PagedGroups
    from antiphon.kernels.fused.paged_latent import PagedLatents

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_BLOCK = 16
_LARGEST_HEAD = 256
_LARGEST_LATENT = 512
_LARGEST_ROPE = 128


class TritonBackend(AttentionBackend):
    """See `antiphon.kernels.fused.attention_items`. Prompts with context are read from the cache too, unless latent."""

    name = "triton"
    capturable = True
    batch_invariant = True

    @classmethod
    def refusal(cls, device: torch.device, shape: AttentionShape, dtype: torch.dtype, block_size: int) -> str | None:
        return device_refusal(device, "triton", "triton") or _refusal_of_sizes(shape, dtype, block_size)

    @property
    def takes_context(self) -> bool:
        return not self.shape.latent and self.dtype.itemsize == 2

    def step_bytes(self, num_requests: int, width: int) -> int:
        from antiphon.kernels.fused.attention_items import items_bytes

        shape = self.shape
        return items_bytes(
            num_requests,
            width * self.block_size,
            chunks=self._kernel.chunks,
            num_heads=shape.num_heads,
            value_size=shape.value_size,
        )

    def prepare(self, block_table_NB: torch.Tensor, seq_lens_N: torch.Tensor) -> ItemList:
        from antiphon.kernels.fused.attention_items import list_items

        return list_items(
            block_table_NB,
            seq_lens_N,
            block_size=self.block_size,
            chunks=self._kernel.chunks,
            num_heads=self.shape.num_heads,
            value_size=self.shape.value_size,
        )

    def decode(
        self,
        q_NHQ: torch.Tensor,
        cache_blocks: torch.Tensor,
        block_table_NB: torch.Tensor,
        seq_lens_N: torch.Tensor,
        prepared: ItemList,
    ) -> torch.Tensor:
        return self._kernel.decode(q_NHQ, cache_blocks, block_table_NB, seq_lens_N, prepared)

    def attend_context(
        self, q_SHQ: torch.Tensor, cache_blocks: torch.Tensor, block_ids_B: torch.Tensor, length: int
    ) -> torch.Tensor:
        from antiphon.kernels.fused.paged_context import attend_context

        shape = self.shape
        assert not shape.latent, "latents are expanded first"
        return attend_context(
            q_SHQ, cache_blocks, block_ids_B, length, num_kv_heads=shape.num_kv_heads, scale=shape.scale
        )

    @cached_property
    def _kernel(self) -> PagedGroups | PagedLatents:
        from antiphon.kernels.fused.paged_gqa import PagedGroups
        from antiphon.kernels.fused.paged_latent import PagedLatents

        shape = self.shape
        if shape.latent:
            return PagedLatents(
                num_heads=shape.num_heads,
                latent_size=shape.value_size,
                rope_size=shape.key_size - shape.value_size,
                scale=shape.scale,
                block_size=self.block_size,
                dtype=self.dtype,
                device=self.device,
            )
        return PagedGroups(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.key_size,
            scale=shape.scale,
            block_size=self.block_size,
            dtype=self.dtype,
            device=self.device,
        )


def _refusal_of_sizes(shape: AttentionShape, dtype: torch.dtype, block_size: int) -> str | None:
    if dtype not in _DTYPES:
        return f"it computes in bfloat16, float16 or float32, and the dtype is {str(dtype).removeprefix('torch.')}"
    if found := block_refusal(block_size, _LEAST_BLOCK):
        return found
    if shape.latent:
        latent, rope = shape.value_size, shape.key_size - shape.value_size
        if latent > _LARGEST_LATENT or rope > _LARGEST_ROPE:
            return f"it takes latents of {_LARGEST_LATENT} + {_LARGEST_ROPE} numbers at most, not {latent} + {rope}"
        if dtype == torch.float32 and latent > _LARGEST_LATENT // 2:
            return f"it takes latents of {_LARGEST_LATENT // 2} numbers at most in float32, not {latent}"
    elif shape.key_size != shape.value_size or shape.key_size > _LARGEST_HEAD:
        return f"it takes heads of {_LARGEST_HEAD} numbers at most, not {max(shape.key_size, shape.value_size)}"
    return None
