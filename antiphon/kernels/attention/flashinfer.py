"""FlashInfer's paged decode kernels (https://docs.flashinfer.ai), for those who install `flashinfer-python`.

Its plan needs the lengths on the host, so the host waits once a step and lane, and nothing is captured in graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from antiphon.kernels.attention.base import AttentionBackend, AttentionShape
from antiphon.kernels.attention.needs import block_refusal, device_refusal, dtype_refusal, without_loose_ends

_WORKSPACE_BYTES = 128 << 20  # what its documentation recommends
_HEAD_SIZES = (64, 128, 256)
_LATENT, _ROPE = 512, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One step's plan. The wrapper is new, because another lane may plan before this one has run."""

    wrapper: Any
    empty_N: torch.Tensor  # rows of length 0


class FlashInferBackend(AttentionBackend):
    """See the module docstring."""

    name = "flashinfer"
    capturable = False
    batch_invariant = False  # texts are cut by how many there are

    @classmethod
    def refusal(cls, device: torch.device, shape: AttentionShape, dtype: torch.dtype, block_size: int) -> str | None:
        common = device_refusal(device, "flashinfer", "flashinfer-python")
        if found := common or dtype_refusal(dtype) or block_refusal(block_size, 1):
            return found
        latent, rope = shape.value_size, shape.key_size - shape.value_size
        if shape.latent and (latent, rope) != (_LATENT, _ROPE):
            return f"it takes latents of {_LATENT} + {_ROPE} numbers, not {latent} + {rope}"
        if not shape.latent and shape.key_size not in _HEAD_SIZES:
            return f"it takes heads of {', '.join(map(str, _HEAD_SIZES))} numbers, not {shape.key_size}"
        return None

    @cached_property
    def _workspace(self) -> torch.Tensor:
        """For partial results. All lanes share it, because their kernels run on one stream."""
        return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)

    def prepare(self, block_table_NB: torch.Tensor, seq_lens_N: torch.Tensor) -> Planned:
        shape, size = self.shape, self.block_size
        lens_N, table_NB, empty_N = without_loose_ends(block_table_NB, seq_lens_N, size)
        num_blocks_N = (lens_N + size - 1) // size
        used_NB = torch.arange(table_NB.shape[1], device=self.device) < num_blocks_N.unsqueeze(1)
        zero_1 = torch.zeros(1, dtype=torch.int32, device=self.device)
        first_N1 = torch.cat([zero_1, num_blocks_N.cumsum(0, dtype=torch.int32)])
        ids_X = table_NB[used_NB]  # the host waits here
        if shape.latent:
            wrapper = import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper(self._workspace)
            rows_N1 = torch.arange(len(lens_N) + 1, dtype=torch.int32, device=self.device)
            wrapper.plan(
                rows_N1,
                first_N1,
                ids_X,
                lens_N,
                shape.num_heads,
                shape.value_size,
                shape.key_size - shape.value_size,
                size,
                False,  # causal: a request has one query
                shape.scale,
                self.dtype,
                self.dtype,
            )
        else:
            decode = import_module("flashinfer.decode")
            # On tensor cores any number of query heads can share a key/value head.
            wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(
                first_N1,
                ids_X,
                (lens_N - 1) % size + 1,
                shape.num_heads,
                shape.num_kv_heads,
                shape.key_size,
                size,
                pos_encoding_mode="NONE",
                q_data_type=self.dtype,
                kv_data_type=self.dtype,
                sm_scale=shape.scale,
            )
        return Planned(wrapper=wrapper, empty_N=empty_N)

    def decode(
        self,
        q_NHQ: torch.Tensor,
        cache_blocks: torch.Tensor,
        block_table_NB: torch.Tensor,
        seq_lens_N: torch.Tensor,
        prepared: Planned,
    ) -> torch.Tensor:
        shape, wrapper = self.shape, prepared.wrapper
        if shape.latent:
            sizes = [shape.value_size, shape.key_size - shape.value_size]
            latent_q_NHC, rope_q_NHP = torch.split(q_NHQ, sizes, dim=-1)
            latents, rope_keys = torch.split(cache_blocks, sizes, dim=-1)
            out_NHV = wrapper.run(latent_q_NHC, rope_q_NHP, latents, rope_keys, return_lse=False)
        else:
            both = cache_blocks.view(*cache_blocks.shape[:2], 2, shape.num_kv_heads, shape.key_size)
            out_NHV = wrapper.run(q_NHQ, both.unbind(2))
        result: torch.Tensor = out_NHV.masked_fill(prepared.empty_N[:, None, None], 0)
        return result
