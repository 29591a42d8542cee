"""Models and their checkpoints: straight-line code in which overlap is the two `finish` calls of the MoE layer.

`read_config`, `match_checkpoint`, `build_model` and `load_weights` make a model, in this order; `CausalLM` is what the
engine then calls.
"""

from antiphon.models.architectures.registry import read_config
from antiphon.models.build import attention_shape, build_model, expert_shape, num_parameters, skeleton, weight_bytes
from antiphon.models.causal_lm import CausalLM, LayerState, run_micro_batch
from antiphon.models.checkpoint.dummy import fill_dummy_weights
from antiphon.models.checkpoint.dummy_routing import RoutingSpec, parse_routing
from antiphon.models.checkpoint.files import Checkpoint
from antiphon.models.checkpoint.hub import resolve_model
from antiphon.models.checkpoint.presets import PRESETS, preset_file
from antiphon.models.checkpoint.weights import LoadProgress, check_checkpoint, load_weights
from antiphon.models.config import ModelConfig
from antiphon.models.match import MatchedCheckpoint, MatchedFiles, match_checkpoint

__all__ = [
    "PRESETS",
    "CausalLM",
    "Checkpoint",
    "LayerState",
    "LoadProgress",
    "MatchedCheckpoint",
    "MatchedFiles",
    "ModelConfig",
    "RoutingSpec",
    "attention_shape",
    "build_model",
    "check_checkpoint",
    "expert_shape",
    "fill_dummy_weights",
    "load_weights",
    "match_checkpoint",
    "num_parameters",
    "parse_routing",
    "preset_file",
    "read_config",
    "resolve_model",
    "run_micro_batch",
    "skeleton",
    "weight_bytes",
]
