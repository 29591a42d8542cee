"""The reference: plain torch on any device. It copies every text's cache together, padded to the longest."""

from __future__ import annotations

import torch

from antiphon.kernels import gqa_attention, mla_attention
from antiphon.kernels.attention.base import AttentionBackend, AttentionShape


class TorchBackend(AttentionBackend):
    """See the module docstring. Sizes of GEMMs depend on the batch, so its bits may too."""

    name = "torch"
    capturable = True
    batch_invariant = False

    @classmethod
    def refusal(cls, device: torch.device, shape: AttentionShape, dtype: torch.dtype, block_size: int) -> str | None:
        return None

    @property
    def capture_obstacle(self) -> str:
        if self.device.type != "cuda":
            return ""
        return "the attention backend torch would copy every text padded to max_model_len in a captured step"

    def prepare(self, block_table_NB: torch.Tensor, seq_lens_N: torch.Tensor) -> None:
        return None

    def decode(
        self,
        q_NHQ: torch.Tensor,
        cache_blocks: torch.Tensor,
        block_table_NB: torch.Tensor,
        seq_lens_N: torch.Tensor,
        prepared: None,
    ) -> torch.Tensor:
        tensors = (q_NHQ, cache_blocks, block_table_NB, seq_lens_N)
        if self.shape.latent:
            return mla_attention.decode_attention(*tensors, self.shape.value_size, self.shape.scale)
        return gqa_attention.decode_attention(*tensors, self.shape.scale)
