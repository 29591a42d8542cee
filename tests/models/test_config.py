"""Reading `config.json`: what is understood, and the errors for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from antiphon.core.errors import ModelError
from antiphon.models import KNOWN_ARCHITECTURES, read_config, skeleton
from antiphon.models.attention.gqa import GroupedQueryConfig
from antiphon.models.decoder import DecoderConfig
from tests.models.twin import rewrite_config, tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_config(architectures=["DeepseekV3ForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path


def error_of(folder: Path) -> str:
    with pytest.raises(ModelError) as refused:
        read_config(folder)
    return str(refused.value)


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
    message = error_of(folder)
    assert str(folder / "config.json") in message
    shown = None if value == "missing" else value
    assert f"{key}={shown!r}; an integer of at least" in message


@pytest.mark.parametrize("key", ["hidden_size", "n_group", "vocab_size", "kv_lora_rank"])
def test_sizes_of_zero(folder: Path, key: str) -> None:
    rewrite_config(folder, **{key: 0})
    assert f"{key}=0; an integer of at least 1 is needed" in error_of(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": "no"}, "attention_bias='no'; true or false is needed"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1; true or false is needed"),
        ({"routed_scaling_factor": "2"}, "routed_scaling_factor='2'; a number is needed"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None; a number is needed"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings=None; true or false is needed"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings='true'; true or false is needed"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types=['full_attention', 'sliding_attention']",
        ),
        ({"layer_types": "full_attention"}, "layer_types='full_attention', which is not supported; only null, or"),
        ({"q_lora_rank": 0}, "q_lora_rank=0"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which is not supported; only 'silu'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax', which is not supported; only 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method='greedy', which is not supported; only 'noaux_tc'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2, which is not supported; only 1"),
        ({"n_group": 5}, "n_routed_experts=12, n_group=5, topk_group=1; groups must divide the experts"),
        ({"n_group": 2, "topk_group": 3}, "n_group=2, topk_group=3"),
        ({"num_experts_per_tok": 13}, "num_experts_per_tok=13"),
        ({"n_group": 6, "num_experts_per_tok": 3}, "1 groups of 2 experts"),
        ({"n_group": 12, "topk_group": 6}, "6 groups of 1 experts"),
        ({"eos_token_id": [1, True]}, r"eos_token_id=[1, True]; token ids are needed"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'; token ids are needed"),
        ({"quantization_config": {}}, "is quantised ('unknown')"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8'; an object is needed"),
    ],
)
def test_what_is_not_supported(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_config(folder, **changes)
    assert message in error_of(folder)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "llama3"}, "rope_type='llama3', which is not supported; only 'default' or 'yarn'"),
        ({"type": "linear", "factor": 2.0}, "rope_type='linear'"),
        ({"rope_type": "yarn", "factor": 0.0}, "yarn with factor=0.0 and"),
        ({"rope_type": "yarn", "factor": float("inf")}, "yarn with factor=inf and"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": -5}, "and -5 original positions"),
        ({"rope_theta": 1}, "rope_theta=1; a number above 1 is needed"),
        ({"rope_type": "yarn"}, "yarn parameters that cannot be read (KeyError('factor'))"),
        ({"rope_type": "yarn", "factor": "large"}, "yarn parameters that cannot be read"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": [1]}, "yarn parameters that cannot be read"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": "big"}, "yarn parameters that cannot be read"),
        ({"rope_type": "default", "rope_theta": "large"}, "rope_theta='large'"),
        ({"rope_type": "default", "rope_theta": None}, "rope_theta=None"),
        ({"rope_type": "yarn", "factor": 1e308}, "makes texts longer than any; use the model's own file"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2**61}, "longer than any"),
        ({"full_attention": {"rope_type": "yarn", "factor": 4.0}}, "rope parameters of their own for 'full_attention'"),
        (["yarn"], "rope"),
        ("yarn", "rope"),
    ],
)
def test_rope_that_is_not_supported(folder: Path, parameters: Any, message: str) -> None:
    rewrite_config(folder, rope_parameters=parameters)
    assert message in error_of(folder)


def test_older_rope_parameters_win_as_in_transformers(folder: Path) -> None:
    rewrite_config(folder, rope_scaling={"type": "llama3"}, rope_parameters={"rope_type": "default"})
    assert "rope_type='llama3'" in error_of(folder)


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
    assert f"{key}={(most + 1) * factor}; at most {most} is possible, so use" in error_of(folder)


def test_sizes_that_make_tensors_that_cannot_be(folder: Path) -> None:
    rewrite_config(folder, hidden_size=2**31 - 1, moe_intermediate_size=2**31 - 1)
    config = read_config(folder)
    with pytest.raises(
        ModelError, match=r"describe tensors that cannot exist \(.*overflow.*\); use the file that was published"
    ):
        skeleton(config)


@pytest.mark.parametrize("positions", [10**7, 2 * 10**9, 2**40])
def test_positions_are_no_size_of_a_tensor(folder: Path, positions: int) -> None:
    rewrite_config(folder, max_position_embeddings=positions)
    config = read_config(folder)
    assert config.max_positions == positions
    assert max(tensor.numel() for _, tensor in skeleton(config).checkpoint_tensors()) < 10**5


def test_an_odd_number_of_rotary_dimensions(folder: Path) -> None:
    rewrite_config(folder, qk_rope_head_dim=7)
    assert "qk_rope_head_dim=7" in error_of(folder)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Qwen2MoeForCausalLM", "the nearest is Qwen3MoeForCausalLM"),
        ("DeepSeekV3ForCausalLM", "the nearest is DeepseekV3ForCausalLM"),
        ("Bert", f"known are {', '.join(KNOWN_ARCHITECTURES)}"),
    ],
)
def test_unknown_architectures(folder: Path, name: str, hint: str) -> None:
    rewrite_config(folder, architectures=[name])
    message = error_of(folder)
    assert f"architecture {name!r}, which is not known" in message
    assert hint in message


@pytest.mark.parametrize("names", [None, [], ["A", "B"], "DeepseekV3ForCausalLM", [3]])
def test_architectures_that_cannot_be_read(folder: Path, names: Any) -> None:
    rewrite_config(folder, architectures=names)
    assert f"names architectures={names!r}; exactly one is expected" in error_of(folder)


def test_no_folder(tmp_path: Path) -> None:
    assert "is not a folder; pass the folder of a Hugging Face checkpoint" in error_of(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    assert "is not a folder" in error_of(folder / "config.json")


def test_no_config(tmp_path: Path) -> None:
    assert f"{tmp_path / 'config.json'} does not exist" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{'hidden_size': 3}", "cannot be read as JSON"),
        (b'{"hidden_size": 3', "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[1, 2]", "holds a list, not an object; download it again"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_a_config_that_is_not_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert message in error_of(tmp_path)


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
    ("kind", "changes", "message"),
    [
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob=True, which is not supported; only False or None"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc', which is not supported"),
        ("deepseek-v2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid', which is not supported"),
        ("deepseek-v2", {"mlp_bias": True}, "mlp_bias=True, which is not supported"),
        ("deepseek-v2", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek-v2", {"topk_method": "group_limited_greedy", "n_group": None}, "n_group=None; an integer"),
        ("qwen3-moe", {"use_sliding_window": True}, "use_sliding_window=True, which is not supported"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2, which is not supported; only 1"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers=[0], which is not supported"),
        ("qwen3-moe", {"partial_rotary_factor": 0.6}, "partial_rotary_factor below 1, which is not supported"),
        ("qwen3-moe", {"num_key_value_heads": 4}, "num_attention_heads=6, num_key_value_heads=4; the first must be"),
        ("qwen3-moe", {"num_experts_per_tok": 13}, "num_experts_per_tok=13"),
        ("qwen3-moe", {"head_dim": 0}, "head_dim=0"),
        ("qwen3-moe", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3-moe", {"quantization_config": {"quant_method": "awq"}}, "is quantised ('awq')"),
        ("glm4-moe", {"partial_rotary_factor": 0.25}, "of head_dim=12, which is 3 dimensions; pairs need an even"),
        ("glm4-moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5; a number above 0, at most 1"),
        ("glm4-moe", {"partial_rotary_factor": "half"}, "partial_rotary_factor='half'; a number"),
        ("glm4-moe", {"n_group": 5}, "groups must divide the experts"),
        ("glm4-moe", {"use_qk_norm": 1}, "use_qk_norm=1; true or false is needed"),
        ("glm4-moe", {"n_shared_experts": None}, "n_shared_experts=None; an integer"),
        ("mixtral", {"sliding_window": 127}, "sliding_window=127, which is not supported; only null, or at least its"),
        ("mixtral", {"sliding_window": 127}, "at least its max_position_embeddings=128"),
        ("mixtral", {"sliding_window": "long"}, "sliding_window='long'"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor below 1, which is not supported"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts=None; an integer"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mixtral", {"intermediate_size": 0}, "intermediate_size=0; an integer"),
    ],
)
def test_what_other_architectures_do_not_support(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    config = tiny_config(kind)
    config.save_pretrained(tmp_path)
    rope = {key: value for key, value in config.rope_parameters.items() if key not in changes}
    rewrite_config(tmp_path, rope_parameters=rope, **changes)
    assert message in error_of(tmp_path)


def test_a_window_must_reach_as_far_as_yarn_does(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 128}
    tiny_config("mixtral", rope_parameters=yarn).save_pretrained(tmp_path)
    rewrite_config(tmp_path, sliding_window=511)
    assert "sliding_window=511, which is not supported; only null, or at least its" in error_of(tmp_path)
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
