"""Qwen3-MoE: grouped-query attention with normalized queries and keys, softmax routing, no shared experts.

Source: Qwen3 Technical Report.
"""

from __future__ import annotations

from antiphon.kernels.router import Scoring
from antiphon.models.attention.gqa import GroupedQueryConfig
from antiphon.models.config import ConfigFile
from antiphon.models.decoder import DEFAULT_EPS, DecoderConfig
from antiphon.models.router import RoutingConfig


def read_qwen3_moe(file: ConfigFile) -> DecoderConfig:
    """Read the configuration of Qwen3-MoE. Raises `ModelError` for keys that are missing, wrong or unsupported."""
    file.require("use_sliding_window", (False,), False)
    file.require("decoder_sparse_step", (1,), 1)
    file.require("mlp_only_layers", ([], None), None)
    experts_key = "num_experts" if file.get("num_local_experts") is None else "num_local_experts"  # transformers 5
    routing = RoutingConfig(
        scores=Scoring.SOFTMAX,
        num_experts=file.count(experts_key),
        top_k=file.count("num_experts_per_tok"),
        normalize=file.flag("norm_topk_prob", False),
        narrow=True,
    )
    bias = file.flag("attention_bias", False)
    attention = GroupedQueryConfig.read(
        file, with_bias=bias, out_bias=bias, qk_norm_eps=file.number("rms_norm_eps", DEFAULT_EPS)
    )
    attention.refuse_partial_rotation(file)
    return DecoderConfig.read(file, attention=attention, routing=routing, num_dense_layers=0, num_shared_experts=0)
