"""Published `config.json` files, as they were published and as transformers 5 writes them again, are read alike.

Their contents are written down as facts, less what only training or other programs use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from antiphon.core.errors import ModelError
from antiphon.models import num_parameters, read_config
from antiphon.models.attention.rope import Yarn
from antiphon.models.decoder import DecoderConfig

_DEEPSEEK: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}

_DEEPSEEK_V2 = _DEEPSEEK | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "vocab_size": 102400,
}

_DEEPSEEK_V3 = _DEEPSEEK | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": _DEEPSEEK["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}

_QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_GLM_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}

_MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}

PUBLISHED: dict[str, tuple[float, dict[str, Any]]] = {  # parameters without layers for multi-token prediction, file
    "deepseek-v2": (236e9, _DEEPSEEK_V2),
    "deepseek-v2.5": (
        236e9,
        _DEEPSEEK_V2 | {"rope_scaling": _DEEPSEEK["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek-v2-lite": (
        15.7e9,
        _DEEPSEEK_V2
        | {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "topk_method": "greedy",
        },
    ),
    "deepseek-v3": (671e9, _DEEPSEEK_V3),
    "deepseek-v3.1": (
        671e9,
        _DEEPSEEK_V3 | {"quantization_config": _DEEPSEEK_V3["quantization_config"] | {"scale_fmt": "ue8m0"}},
    ),
    "qwen3-30b-a3b": (30.5e9, _QWEN3_30B),
    "qwen3-30b-a3b-long": (
        30.5e9,
        _QWEN3_30B
        | {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            "max_position_embeddings": 131072,
        },
    ),
    "qwen3-235b-a22b": (
        235e9,
        _QWEN3_30B
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_window_layers": 94,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 64,
            "num_hidden_layers": 94,
        },
    ),
    "glm-4.5": (
        353e9,
        _GLM_AIR
        | {
            "first_k_dense_replace": 3,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "num_hidden_layers": 92,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
        },
    ),
    "glm-4.5-air": (106.9e9, _GLM_AIR),
    "mixtral-8x7b": (46.7e9, _MIXTRAL_8X7B),
    "mixtral-8x22b": (
        140.6e9,
        _MIXTRAL_8X7B
        | {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "max_position_embeddings": 65536,
            "num_attention_heads": 48,
            "num_hidden_layers": 56,
        },
    ),
}


@pytest.fixture(params=PUBLISHED)
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[request.param][1]))
    return str(request.param)


def read(folder: Path) -> DecoderConfig:
    config = read_config(folder)
    assert isinstance(config, DecoderConfig)
    return config


def test_as_it_was_published(name: str, tmp_path: Path) -> None:
    num_published, values = PUBLISHED[name]
    config = read(tmp_path)
    assert num_parameters(config) == pytest.approx(num_published, rel=0.005)
    assert (config.num_layers, config.vocab_size) == (values["num_hidden_layers"], values["vocab_size"])
    assert config.max_positions == values["max_position_embeddings"]
    assert config.attention.rope.theta == values["rope_theta"]
    assert (config.attention.rope.yarn is not None) == bool(values.get("rope_scaling"))
    assert config.routing.scale == values.get("routed_scaling_factor", 1.0)
    limited = values.get("topk_method", "noaux_tc") != "greedy"
    assert config.routing.num_groups == (values.get("n_group", 1) if limited else 1)


def test_as_transformers_writes_it_again(name: str, tmp_path: Path) -> None:
    """With `rope_parameters` in place of `rope_theta` and `rope_scaling`, and with its defaults."""
    published = read(tmp_path)
    again = tmp_path / "again"
    AutoConfig.from_pretrained(tmp_path).save_pretrained(again)
    values = json.loads((again / "config.json").read_text())
    assert "rope_parameters" in values
    assert "rope_scaling" not in values
    assert read(again) == published


# What decides by itself whether tensors are needed: without it the tensors of the file do not fit. And what only ends
# texts, or tells transformers which class to use.
_NOT_A_DEFAULT = {"n_shared_experts", "q_lora_rank", "eos_token_id", "model_type"}


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3", "qwen3-30b-a3b", "glm-4.5", "mixtral-8x7b"])
def test_a_key_that_is_missing_means_what_it_means_to_transformers(name: str, tmp_path: Path) -> None:
    """Or is asked for: no value of ours where theirs is another."""
    values = PUBLISHED[name][1]
    refused = set()
    for key in values.keys() - _NOT_A_DEFAULT:
        (tmp_path / "config.json").write_text(json.dumps({other: values[other] for other in values if other != key}))
        try:
            ours = read(tmp_path)
        except ModelError:
            refused.add(key)
            continue
        AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        assert read(tmp_path / "again") == ours, key
    assert {"hidden_size", "num_hidden_layers", "max_position_embeddings"} <= refused
    assert not refused & {
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "routed_scaling_factor",
    }


def test_yarn_of_deepseek(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_DEEPSEEK_V2))
    assert read(tmp_path).attention.rope.yarn == Yarn(
        factor=40,
        original_positions=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=0.707,
        mscale_all_dim=0.707,
        attention_factor=None,
        truncate=True,
    )
