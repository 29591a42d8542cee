"""Reading `config.json`: what is understood, and the errors for what is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from antiphon.core.errors import ModelError
from antiphon.models import read_config, skeleton
from antiphon.models.architectures.registry import READERS
from antiphon.models.attention.gqa import GroupedQueryConfig
from antiphon.models.decoder import DecoderConfig
from tests.models.twin import rewrite_config, tiny_config
from tests.support.errors import ANY, raises


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_config(architectures=["DeepseekV3ForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path


def refused(folder: Path, *names: str, option: str | None = None, value: Any = ANY, remedy: str = "") -> ModelError:
    """The error of `read_config`, whose fields are as given and which names the file."""
    with raises(ModelError, *names, option=option, value=value, remedy=remedy) as raised:
        read_config(folder)
    assert isinstance(raised.error, ModelError)
    return raised.error


def test_sizes(folder: Path) -> None:
    config = read_config(folder)
    assert isinstance(config, DecoderConfig)
    assert config.architecture == "DeepseekV3ForCausalLM"
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.max_positions) == (3, 24, 61, 128)
    assert (config.num_experts, config.top_k, config.kv_width) == (12, 3, 18 + 8)
    assert (config.num_dense_layers, config.dense_width, config.expert_width) == (1, 40, 20)
    assert config.num_shared_experts == 1
    assert (config.attention.query_rank, config.attention.head_size, config.attention.value_size) == (14, 18, 9)
    assert config.routing.scale == pytest.approx(1.7)
    assert config.eos_token_ids == (1,)


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
        "intermediate_size",
        "moe_intermediate_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", ["missing", None, "12", 1.5, True, -1])
def test_sizes_that_are_missing_or_wrong(folder: Path, key: str, value: Any) -> None:
    rewrite_config(folder, remove=[key] if value == "missing" else [], **{key: value})
    refused(folder, str(folder / "config.json"), option=key, value=None if value == "missing" else value)


@pytest.mark.parametrize("key", ["hidden_size", "n_group", "vocab_size", "kv_lora_rank"])
def test_sizes_of_zero(folder: Path, key: str) -> None:
    rewrite_config(folder, **{key: 0})
    refused(folder, option=key, value=0, remedy="1")


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"attention_bias": "no"}, "attention_bias"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"routed_scaling_factor": "2"}, "routed_scaling_factor"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"n_group": 5}, "n_group"),
        ({"n_group": 2, "topk_group": 3}, "n_group"),
        ({"num_experts_per_tok": 13}, "num_experts_per_tok"),
        ({"n_group": 6, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"n_group": 12, "topk_group": 6}, "num_experts_per_tok"),
        ({"eos_token_id": [1, True]}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"quantization_config": {}}, "quant_method"),
        ({"quantization_config": "fp8"}, "quantization_config"),
    ],
)
def test_what_is_not_supported(folder: Path, changes: dict[str, Any], option: str) -> None:
    rewrite_config(folder, **changes)
    refused(folder, option=option, value=changes.get(option, ANY))


@pytest.mark.parametrize(
    ("changes", "groups", "experts"),
    [({"n_group": 6, "num_experts_per_tok": 3}, 1, 2), ({"n_group": 12, "topk_group": 6}, 6, 1)],
)
def test_more_experts_than_the_chosen_groups_have(
    folder: Path, changes: dict[str, Any], groups: int, experts: int
) -> None:
    rewrite_config(folder, **changes)
    limit = refused(folder, option="num_experts_per_tok", value=3).limit
    assert re.findall(r"\d+", limit) == [str(groups), str(experts)]


@pytest.mark.parametrize(
    ("parameters", "option", "names"),
    [
        ({"rope_type": "llama3"}, "rope_type", ("llama3", "default", "yarn")),
        ({"type": "linear", "factor": 2.0}, "rope_type", ("linear",)),
        ({"rope_theta": 1}, "rope_theta", ("1",)),
        ({"rope_type": "default", "rope_theta": "large"}, "rope_theta", ("large",)),
        ({"rope_type": "default", "rope_theta": None}, "rope_theta", ("None",)),
        ({"rope_type": "yarn", "factor": 0.0}, "rope_parameters", ("factor=0.0",)),
        ({"rope_type": "yarn", "factor": float("inf")}, "rope_parameters", ("factor=inf",)),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": -5}, "rope_parameters", ("-5",)),
        ({"rope_type": "yarn"}, "rope_parameters", ("KeyError('factor')",)),
        ({"rope_type": "yarn", "factor": "large"}, "rope_parameters", ("ValueError",)),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": [1]}, "rope_parameters", ("TypeError",)),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": "big"}, "rope_parameters", ("ValueError",)),
        ({"rope_type": "yarn", "factor": 1e308}, "rope_parameters", ("1e+308", str(2**62))),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2**61},
            "rope_parameters",
            (str(2**61), str(2**62)),
        ),
        ({"full_attention": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters", ("'full_attention'",)),
        (["yarn"], "rope_parameters", ()),
        ("yarn", "rope_parameters", ()),
    ],
)
def test_rope_that_is_not_supported(folder: Path, parameters: Any, option: str, names: tuple[str, ...]) -> None:
    rewrite_config(folder, rope_parameters=parameters)
    refused(folder, *names, option=option)


def test_older_rope_parameters_win_as_in_transformers(folder: Path) -> None:
    rewrite_config(folder, rope_scaling={"type": "llama3"}, rope_parameters={"rope_type": "default"})
    refused(folder, option="rope_type", value="llama3")


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("vocab_size", 2**31 - 1),
        ("hidden_size", 2**31 - 1),
        ("n_routed_experts", 2**31 - 1),
        ("moe_intermediate_size", 2**31 - 1),
        ("num_hidden_layers", 10_000),
        ("max_position_embeddings", 2**62),
    ],
)
@pytest.mark.parametrize("factor", [1, 10**30])
def test_sizes_that_nothing_can_have(folder: Path, key: str, most: int, factor: int) -> None:
    rewrite_config(folder, **{key: (most + 1) * factor})
    assert str(most) in refused(folder, option=key, value=(most + 1) * factor).limit


def test_sizes_that_make_tensors_that_cannot_be(folder: Path) -> None:
    rewrite_config(folder, hidden_size=2**31 - 1, moe_intermediate_size=2**31 - 1)
    config = read_config(folder)
    with raises(ModelError, "overflow", "config.json", remedy="DeepseekV3ForCausalLM"):
        skeleton(config)


@pytest.mark.parametrize("positions", [10**7, 2 * 10**9, 2**40])
def test_positions_are_no_size_of_a_tensor(folder: Path, positions: int) -> None:
    rewrite_config(folder, max_position_embeddings=positions)
    config = read_config(folder)
    assert config.max_positions == positions
    assert max(tensor.numel() for _, tensor in skeleton(config).checkpoint_tensors()) < 10**5


def test_an_odd_number_of_rotary_dimensions(folder: Path) -> None:
    rewrite_config(folder, qk_rope_head_dim=7)
    refused(folder, option="qk_rope_head_dim", value=7)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
        ("DeepSeekV3ForCausalLM", "DeepseekV3ForCausalLM"),
        ("Bert", None),
    ],
)
def test_unknown_architectures(folder: Path, name: str, nearest: str | None) -> None:
    rewrite_config(folder, architectures=[name])
    remedy = refused(folder, option="architectures", value=name, remedy=", ".join(READERS)).remedy
    assert remedy.count("ForCausalLM") == len(READERS) + (nearest is not None)
    assert nearest is None or remedy.endswith(f"{nearest!r}?")


@pytest.mark.parametrize("names", [None, [], ["A", "B"], "DeepseekV3ForCausalLM", [3]])
def test_architectures_that_cannot_be_read(folder: Path, names: Any) -> None:
    rewrite_config(folder, architectures=names)
    refused(folder, option="architectures", value=names)


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", option="model", value=tmp_path / "nowhere", remedy="folder")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    refused(folder / "config.json", option="model", value=folder / "config.json")


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, option="model", value=tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "JSON"),
        (b"{'hidden_size': 3}", "JSON"),
        (b'{"hidden_size": 3', "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[1, 2]", "list"),
        (b"null", "NoneType"),
    ],
)
def test_a_config_that_is_not_json(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, name, str(tmp_path / "config.json"), remedy="download")


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (5, None, (5,)),
        ([5, 6], None, (5, 6)),
        (None, None, ()),
        (5, {"eos_token_id": 7}, (7, 5)),
        (5, {"eos_token_id": [7, 8]}, (7, 8, 5)),
        (8, {"eos_token_id": [7, 8]}, (7, 8)),
        (5, {"eos_token_id": None}, (5,)),
        (5, {"eos_token_id": [7, 10**6, -1]}, (7, 5)),
        (-1, None, ()),
        (5, {}, (5,)),
    ],
)
def test_end_of_sequence_tokens(
    folder: Path,
    in_config: Any,
    in_generation: dict[str, Any] | None,
    expected: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Those of both files; where the second lacks one of the first, somebody is told."""
    rewrite_config(folder, eos_token_id=in_config)
    if in_generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(in_generation))
    assert read_config(folder).eos_token_ids == expected
    generating = (in_generation or {}).get("eos_token_id")
    assert ("each of these tokens ends a text" in caplog.text) is (generating is not None and in_config == 5)


def test_keys_with_defaults_may_be_missing(folder: Path) -> None:
    optional = ["attention_bias", "rope_interleave", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps"]
    rewrite_config(folder, remove=[*optional, "tie_word_embeddings", "hidden_act", "q_lora_rank", "n_shared_experts"])
    config = read_config(folder)
    assert isinstance(config, DecoderConfig)
    assert (config.attention.bias, config.attention.rope.interleaved, config.routing.normalize) == (False, True, True)
    assert (config.attention.query_rank, config.num_shared_experts, config.tied_embeddings) == (None, 0, False)


# ---- the other architectures


@pytest.mark.parametrize(
    ("kind", "changes", "option"),
    [
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek-v2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek-v2", {"mlp_bias": True}, "mlp_bias"),
        ("deepseek-v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek-v2", {"topk_method": "group_limited_greedy", "n_group": None}, "n_group"),
        ("qwen3-moe", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3-moe", {"partial_rotary_factor": 0.6}, "partial_rotary_factor"),
        ("qwen3-moe", {"num_key_value_heads": 4}, "num_attention_heads"),
        ("qwen3-moe", {"num_experts_per_tok": 13}, "num_experts_per_tok"),
        ("qwen3-moe", {"head_dim": 0}, "head_dim"),
        ("qwen3-moe", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen3-moe", {"quantization_config": {"quant_method": "awq"}}, "quant_method"),
        ("glm4-moe", {"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ("glm4-moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("glm4-moe", {"partial_rotary_factor": "half"}, "partial_rotary_factor"),
        ("glm4-moe", {"n_group": 5}, "n_group"),
        ("glm4-moe", {"use_qk_norm": 1}, "use_qk_norm"),
        ("glm4-moe", {"n_shared_experts": None}, "n_shared_experts"),
        ("mixtral", {"sliding_window": 127}, "sliding_window"),
        ("mixtral", {"sliding_window": "long"}, "sliding_window"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act"),
        ("mixtral", {"intermediate_size": 0}, "intermediate_size"),
    ],
)
def test_what_other_architectures_do_not_support(
    tmp_path: Path, kind: str, changes: dict[str, Any], option: str
) -> None:
    config = tiny_config(kind)
    config.save_pretrained(tmp_path)
    rope = {key: value for key, value in config.rope_parameters.items() if key not in changes}
    rewrite_config(tmp_path, rope_parameters=rope, **changes)
    whole_head = option == "partial_rotary_factor" and kind != "glm4-moe"  # the share is of whole dimensions then
    refused(tmp_path, option=option, value=ANY if whole_head else changes.get(option, ANY))


def test_a_window_must_reach_as_far_as_yarn_does(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 128}
    tiny_config("mixtral", rope_parameters=yarn).save_pretrained(tmp_path)
    rewrite_config(tmp_path, sliding_window=511)
    assert "512" in refused(tmp_path, option="sliding_window", value=511).limit
    rewrite_config(tmp_path, sliding_window=512)
    assert read_config(tmp_path).max_positions == 512


def test_mixtral_has_no_biases_whatever_its_file_says(tmp_path: Path) -> None:
    """As in transformers; tensors of biases are refused then."""
    tiny_config("mixtral").save_pretrained(tmp_path)
    rewrite_config(tmp_path, attention_bias=True)
    config = read_config(tmp_path)
    assert isinstance(config, DecoderConfig)
    assert isinstance(config.attention, GroupedQueryConfig)
    assert not config.attention.bias


def test_older_checkpoints_name_rotary_parameters_at_the_top(tmp_path: Path) -> None:
    tiny_config("glm4-moe").save_pretrained(tmp_path)
    rewrite_config(tmp_path, remove=["rope_parameters"], rope_theta=500, partial_rotary_factor=0.5, rope_scaling=None)
    config = read_config(tmp_path)
    assert isinstance(config, DecoderConfig)
    assert (config.attention.rope.theta, config.attention.rope.size) == (500.0, 6)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_names_of_the_number_of_experts(tmp_path: Path, key: str) -> None:
    tiny_config("qwen3-moe").save_pretrained(tmp_path)
    rewrite_config(tmp_path, remove={"num_experts", "num_local_experts"} - {key}, **{key: 12})
    assert read_config(tmp_path).num_experts == 12
