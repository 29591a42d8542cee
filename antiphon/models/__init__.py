"""Models: straight-line code, in which overlap is two `finish` calls of the MoE layer, and their checkpoints."""

from antiphon.models.causal_lm import CausalLM
from antiphon.models.config import ModelConfig
from antiphon.models.registry import KNOWN_ARCHITECTURES, build_model, expert_shape, read_config, skeleton
from antiphon.models.weights import Checkpoint, check_checkpoint, load_weights

__all__ = [
    "KNOWN_ARCHITECTURES",
    "CausalLM",
    "Checkpoint",
    "ModelConfig",
    "build_model",
    "check_checkpoint",
    "expert_shape",
    "load_weights",
    "read_config",
    "skeleton",
]
