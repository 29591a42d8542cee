"""Mixtral: grouped-query attention, softmax routing over a few wide experts, no shared experts, no dense layers.

Its checkpoints name the parts of an expert w1, w3 and w2. Source: "Mixtral of Experts".
"""

from __future__ import annotations

from antiphon.core.errors import is_whole
from antiphon.kernels.router import Scoring
from antiphon.models.attention.gqa import GroupedQueryConfig
from antiphon.models.config import USE_ANOTHER_MODEL, ConfigFile
from antiphon.models.decoder import DecoderConfig
from antiphon.models.moe import MoENames
from antiphon.models.router import RoutingConfig

_DEFAULT_EPS = 1e-5
_NAMES = MoENames(layer="block_sparse_moe", gate="w1", up="w3", down="w2")


def read_mixtral(file: ConfigFile) -> DecoderConfig:
    """Read the configuration of Mixtral. Raises `ModelError` for keys that are missing, wrong or unsupported."""
    routing = RoutingConfig(
        scores=Scoring.SOFTMAX,
        num_experts=file.count("num_local_experts"),
        top_k=file.count("num_experts_per_tok"),
        normalize=True,  # the same as a softmax over the chosen ones
        narrow=True,
    )
    attention = GroupedQueryConfig.read(file, with_bias=False, out_bias=False, default_theta=1e6)
    attention.refuse_partial_rotation(file)
    config = DecoderConfig.read(
        file,
        attention=attention,
        routing=routing,
        num_dense_layers=0,
        num_shared_experts=0,
        expert_width_key="intermediate_size",
        default_eps=_DEFAULT_EPS,
        moe_names=_NAMES,
    )
    _refuse_short_window(file, config.max_positions)  # yarn may stretch them beyond those of the file
    return config


def _refuse_short_window(file: ConfigFile, positions: int) -> None:
    """Refuse a window that is shorter than the longest sequence; a longer one masks nothing."""
    window = file.get("sliding_window")
    if window is not None and (not is_whole(window) or window < positions):
        limit = f"only null, or at least max_position_embeddings={positions}, is supported"
        raise file.fault("sliding_window", window, limit=limit, remedy=USE_ANOTHER_MODEL)
