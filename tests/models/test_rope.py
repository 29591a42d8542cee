"""Rotary angles, their scale and the score scale against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from antiphon.models import read_config
from antiphon.models.attention.rope import RopeConfig, rope_angles, rope_tables, score_scale
from antiphon.models.decoder import DecoderConfig
from tests.models.twin import rewrite_config, tiny_config

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
}

CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "yarn": YARN,
    "yarn-mscales": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7},
    "yarn-mscale": YARN | {"mscale": 1.2},
    "yarn-mscale-all-dim": YARN | {"mscale_all_dim": 0.7},
    "yarn-attention-factor": YARN | {"attention_factor": 1.5},
    "yarn-factor-one": YARN | {"factor": 1.0, "mscale_all_dim": 1.0},
    "yarn-truncated-range": YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096},
    "yarn-not-truncated": YARN | {"truncate": False},
}


def save(folder: Path, parameters: dict[str, Any]) -> DeepseekV3Attention:
    config = tiny_config(rope_parameters=parameters, qk_rope_head_dim=16, architectures=["DeepseekV3ForCausalLM"])
    config._attn_implementation = "eager"
    config.save_pretrained(folder)
    return DeepseekV3Attention(config, layer_idx=0)


def read_rope(folder: Path) -> RopeConfig:
    config = read_config(folder)
    assert isinstance(config, DecoderConfig)
    return config.attention.rope


@pytest.mark.parametrize("case", CASES)
def test_same_tables(case: str, tmp_path: Path) -> None:
    attention = save(tmp_path, CASES[case])
    theirs = DeepseekV3RotaryEmbedding(attention.config)
    rope = read_rope(tmp_path)
    angles_P = rope_angles(rope)
    torch.testing.assert_close(angles_P, theirs.inv_freq, rtol=1e-6, atol=0)
    positions_T = torch.tensor([0, 1, 5, 63, 64, 400])
    their_cos, their_sin = theirs(torch.zeros(1, dtype=torch.float32), positions_T.unsqueeze(0))
    cos_TP, sin_TP = rope_tables(angles_P, positions_T, rope, torch.float32)
    torch.testing.assert_close(cos_TP, their_cos[0, :, :8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin_TP, their_sin[0, :, :8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_same_score_scale(case: str, tmp_path: Path) -> None:
    attention = save(tmp_path, CASES[case])
    assert score_scale(read_rope(tmp_path), attention.qk_head_dim) == pytest.approx(attention.scaling, rel=1e-9)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones(tmp_path: Path) -> None:
    save(tmp_path / "yarn", YARN)
    save(tmp_path / "plain", {"rope_type": "default", "rope_theta": 10_000.0})
    ratio_P = rope_angles(read_rope(tmp_path / "plain")) / rope_angles(read_rope(tmp_path / "yarn"))
    assert ratio_P[0] == pytest.approx(1)
    assert ratio_P[-1] == pytest.approx(8)
    assert ((ratio_P > 1.1) & (ratio_P < 7.9)).any(), "no pair lies on the ramp"


def test_older_checkpoints_say_the_same_in_other_words(tmp_path: Path) -> None:
    save(tmp_path / "new", YARN | {"mscale": 1.0, "mscale_all_dim": 0.7})
    save(tmp_path / "old", YARN)
    scaling = {key: value for key, value in YARN.items() if key not in ("rope_type", "rope_theta")}
    rewrite_config(
        tmp_path / "old",
        remove=["rope_parameters"],
        rope_theta=10_000,
        rope_scaling=scaling | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7},
    )
    assert read_rope(tmp_path / "old") == read_rope(tmp_path / "new")
    rewrite_config(tmp_path / "old", rope_scaling=None)
    assert read_rope(tmp_path / "old") == RopeConfig(size=16, theta=10_000.0, interleaved=True, yarn=None)


def test_tables_are_exact_far_from_the_origin(tmp_path: Path) -> None:
    save(tmp_path, {"rope_type": "default", "rope_theta": 10_000.0})
    rope = read_rope(tmp_path)
    cos_TP, _ = rope_tables(rope_angles(rope), torch.tensor([100_000]), rope, torch.bfloat16)
    exact = torch.tensor([math.cos(float(angle) * 100_000) for angle in rope_angles(rope)])
    assert cos_TP.dtype == torch.bfloat16
    torch.testing.assert_close(cos_TP[0].float(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("parameters", "expected"), [(YARN, 512), (YARN | {"factor": 1.0}, 200), (CASES["default"], 200)]
)
def test_yarn_reaches_as_far_as_it_stretches(parameters: dict[str, Any], expected: int, tmp_path: Path) -> None:
    """Where the checkpoint leaves the length of its training in max_position_embeddings."""
    save(tmp_path, parameters)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 200}))
    assert read_config(tmp_path).max_positions == expected
