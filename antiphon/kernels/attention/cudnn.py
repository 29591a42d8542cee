"""cuDNN's attention over paged caches, for those who install `nvidia-cudnn-frontend`.

Source: https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html ("paged attention").
A cuDNN graph is built for each number of requests and width of the table; that takes the host milliseconds, so nothing
is captured in CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from antiphon.kernels.attention.base import AttentionBackend, AttentionShape
from antiphon.kernels.attention.needs import block_refusal, device_refusal, dtype_refusal, without_loose_ends

_LEAST_VERSION = 90500
_LARGEST_HEAD = 128
_HEAD_UNIT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """One step's lengths and table as cuDNN takes them, all int32."""

    ones_N: torch.Tensor  # [N, 1, 1, 1], new tokens
    lens_N: torch.Tensor  # [N, 1, 1, 1]
    table_NB: torch.Tensor  # [N, 1, B, 1]
    empty_N: torch.Tensor  # bool [N]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A cuDNN graph, and its tensors in the order of `_tensors`, the result last."""

    graph: Any
    tensors: tuple[Any, ...]
    workspace_bytes: int


class CudnnBackend(AttentionBackend):
    """See the module docstring."""

    name = "cudnn"
    capturable = False
    batch_invariant = False  # cuDNN promises nothing about it

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(shape, dtype, block_size, device)
        self._built: dict[tuple[torch.Size, ...], Built] = {}

    @classmethod
    def refusal(cls, device: torch.device, shape: AttentionShape, dtype: torch.dtype, block_size: int) -> str | None:
        common = device_refusal(device, "cudnn", "nvidia-cudnn-frontend")
        if found := common or dtype_refusal(dtype) or block_refusal(block_size, 1):
            return found
        if (version := import_module("cudnn").backend_version()) < _LEAST_VERSION:
            return f"it needs cuDNN 9.5 or later, and the version is {version}"
        if shape.latent:
            return "it has no kernel for latents"
        if shape.key_size > _LARGEST_HEAD or shape.key_size % _HEAD_UNIT:
            return f"it takes heads of {_LARGEST_HEAD} numbers at most, in multiples of {_HEAD_UNIT}"
        return None

    @cached_property
    def _handle(self) -> Any:
        return import_module("cudnn").create_handle()

    def prepare(self, block_table_NB: torch.Tensor, seq_lens_N: torch.Tensor) -> Lengths:
        lens_N, table_NB, empty_N = without_loose_ends(block_table_NB, seq_lens_N, self.block_size)
        return Lengths(
            ones_N=torch.ones_like(lens_N).view(-1, 1, 1, 1),
            lens_N=lens_N.view(-1, 1, 1, 1),
            table_NB=table_NB.contiguous()[:, None, :, None],
            empty_N=empty_N,
        )

    def decode(
        self,
        q_NHQ: torch.Tensor,
        cache_blocks: torch.Tensor,
        block_table_NB: torch.Tensor,
        seq_lens_N: torch.Tensor,
        prepared: Lengths,
    ) -> torch.Tensor:
        cudnn = import_module("cudnn")
        q_NHQ = q_NHQ.contiguous()
        out_NHQ = torch.empty_like(q_NHQ)
        given = (*self._tensors(q_NHQ, cache_blocks, prepared), out_NHQ.unsqueeze(2))
        key = (q_NHQ.shape, prepared.table_NB.shape, cache_blocks.shape)
        built = self._built.get(key)
        if built is None:
            built = self._built[key] = self._build(cudnn, given)
        if q_NHQ.is_cuda:
            cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream(self.device).cuda_stream)
        workspace = torch.empty(built.workspace_bytes, dtype=torch.uint8, device=q_NHQ.device)
        built.graph.execute(dict(zip(built.tensors, given, strict=True)), workspace, handle=self._handle)
        return out_NHQ.masked_fill(prepared.empty_N[:, None, None], 0)

    def _tensors(self, q_NHQ: torch.Tensor, cache_blocks: torch.Tensor, prepared: Lengths) -> tuple[torch.Tensor, ...]:
        """Queries [N, H, 1, Q], keys and values [num_blocks, G, block_size, Q], both lengths, the table."""
        shape = self.shape
        both = cache_blocks.view(*cache_blocks.shape[:2], 2, shape.num_kv_heads, shape.key_size)
        keys, values = both.permute(2, 0, 3, 1, 4).unbind(0)
        return q_NHQ.unsqueeze(2), keys, values, prepared.ones_N, prepared.lens_N, prepared.table_NB

    def _build(self, cudnn: Any, given: tuple[torch.Tensor, ...]) -> Built:
        kinds = cudnn.data_type
        graph = cudnn.pygraph(
            io_data_type=kinds.BFLOAT16 if self.dtype == torch.bfloat16 else kinds.HALF,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=self._handle,
        )
        *inputs, out = given
        q, keys, values, ones, lens, table = tensors = [graph.tensor_like(tensor) for tensor in inputs]
        result, _ = graph.sdpa(
            name="decode",
            q=q,
            k=keys,
            v=values,
            is_inference=True,
            attn_scale=self.shape.scale,
            use_padding_mask=True,
            seq_len_q=ones,
            seq_len_kv=lens,
            paged_attention_k_table=table,
            paged_attention_v_table=table,
            paged_attention_max_seq_len_kv=inputs[5].shape[2] * self.block_size,
        )
        result.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return Built(graph=graph, tensors=(*tensors, result), workspace_bytes=graph.get_workspace_size())
