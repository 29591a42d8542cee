"""GLM-4.5: grouped-query attention that rotates half of a head, sigmoid routing, shared experts, leading dense layers.

Source: "GLM-4.5: Agentic, Reasoning, and Coding (ARC) Foundation Models".
"""

from __future__ import annotations

from antiphon.models.attention.gqa import GroupedQueryConfig
from antiphon.models.config import ConfigFile
from antiphon.models.decoder import DecoderConfig
from antiphon.models.router import RoutingConfig

_DEFAULT_EPS = 1e-5


def read_glm4_moe(file: ConfigFile) -> DecoderConfig:
    """Read the configuration of GLM-4.5. Raises `ModelError` for keys that are missing, wrong or unsupported."""
    qk_norm = file.flag("use_qk_norm", False)
    attention = GroupedQueryConfig.read(
        file,
        with_bias=file.flag("attention_bias", False),
        out_bias=False,
        qk_norm_eps=file.number("rms_norm_eps", _DEFAULT_EPS) if qk_norm else None,
        default_share=0.5,
    )
    return DecoderConfig.read(
        file,
        attention=attention,
        routing=RoutingConfig.read_sigmoid(file, default_scale=1.0),
        num_dense_layers=file.count("first_k_dense_replace", minimum=0),
        num_shared_experts=file.count("n_shared_experts", minimum=0),
        default_eps=_DEFAULT_EPS,
    )
