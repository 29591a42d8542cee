"""DeepSeek-V2 (and V2-Lite) and DeepSeek-V3: latent attention, shared experts, leading dense layers.

V2 chooses experts by softmax scores, V3 by sigmoid scores with a correction bias. Both may limit a token to a few
groups of experts.
Sources: DeepSeek-V2 paper, DeepSeek-V3 Technical Report.
"""

from __future__ import annotations

from antiphon.kernels.router import Scoring
from antiphon.models.attention.mla import LatentAttentionConfig
from antiphon.models.config import ConfigFile
from antiphon.models.decoder import DecoderConfig
from antiphon.models.router import RoutingConfig


def read_deepseek_v3(file: ConfigFile) -> DecoderConfig:
    """Read the configuration of DeepSeek-V3. Raises `ModelError` for keys that are missing, wrong or unsupported."""
    file.require("scoring_func", ("sigmoid",), "sigmoid")
    file.require("topk_method", ("noaux_tc",), "noaux_tc")
    attention = LatentAttentionConfig.read(file, interleaved=file.flag("rope_interleave", True))
    return _read(file, attention, RoutingConfig.read_sigmoid(file, default_scale=2.5))


def read_deepseek_v2(file: ConfigFile) -> DecoderConfig:
    """Read the configuration of a DeepSeek-V2 model. Raises `ModelError` as `read_deepseek_v3` does."""
    file.require("scoring_func", ("softmax",), "softmax")
    file.require("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    # No released checkpoint sets it, and implementations disagree about whether it replaces the scaling factor.
    file.require("norm_topk_prob", (False, None), False)
    file.require("mlp_bias", (False,), False)
    limited = file.get("topk_method") == "group_limited_greedy"
    routing = RoutingConfig(
        scores=Scoring.SOFTMAX,
        num_experts=file.count("n_routed_experts"),
        top_k=file.count("num_experts_per_tok"),
        num_groups=file.count("n_group") if limited else 1,
        top_groups=file.count("topk_group") if limited else 1,
        normalize=False,
        scale=file.number("routed_scaling_factor", 1.0),
    )
    return _read(file, LatentAttentionConfig.read(file, interleaved=True), routing)


def _read(file: ConfigFile, attention: LatentAttentionConfig, routing: RoutingConfig) -> DecoderConfig:
    file.require("moe_layer_freq", (1,), 1)
    return DecoderConfig.read(
        file,
        attention=attention,
        routing=routing,
        num_dense_layers=file.count("first_k_dense_replace", minimum=0),
        num_shared_experts=0 if file.get("n_shared_experts") is None else file.count("n_shared_experts", minimum=0),
    )
