"""Dummy weights: all filled, alike on all ranks, and finite at depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.comm import RankGroup, create_transport
from antiphon.core.batch import RequestSlice
from antiphon.models import build_model, expert_shape, fill_dummy_weights, read_config
from antiphon.models.decoder import Decoder
from antiphon.runtime import CpuStreams
from tests.models.twin import KINDS, Twin, random_ids, scattered_blocks, tiny_config


def make_model(
    folder: Path,
    kind: str,
    *,
    rank: int = 0,
    size: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Decoder:
    tiny_config(kind, **changes).save_pretrained(folder)
    config = read_config(folder)
    group = RankGroup(rank=rank, size=size, process_group=object())  # type: ignore[arg-type]
    transport = create_transport("auto", expert_shape(config, dtype), group=group, streams=CpuStreams(), num_lanes=1)
    model = build_model(config, transport)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.fill_(float("nan"))
    fill_dummy_weights(model, seed=seed)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_filled(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, kind, hidden_size=48)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name
    for name, tensor in model.checkpoint_tensors():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            expected = 1.0 if "embed" in name else tensor.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
                expected /= 10
            assert float(tensor.std()) == pytest.approx(expected, rel=0.2), name


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_parts_of_the_same_model(kind: str, tmp_path: Path) -> None:
    whole = dict(make_model(tmp_path, kind).checkpoint_tensors())
    seen = set()
    for rank in range(3):
        part = dict(make_model(tmp_path, kind, rank=rank, size=3).checkpoint_tensors())
        assert len(part) < len(whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
        seen |= part.keys()
    assert seen == whole.keys()


def test_tensors_and_seeds_differ(tmp_path: Path) -> None:
    first = dict(make_model(tmp_path, "qwen3-moe").checkpoint_tensors())
    other = dict(make_model(tmp_path, "qwen3-moe", seed=1).checkpoint_tensors())
    name = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    assert not torch.equal(first[name.format(0)], first[name.format(1)])
    assert not torch.equal(first[name.format(0)], other[name.format(0)])


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_activations_stay_finite_and_tokens_different(kind: str, tmp_path: Path) -> None:
    """At the depth of the deepest preset in bfloat16; tokens that became one would all go to the same experts."""
    model = make_model(tmp_path, kind, num_hidden_layers=94, dtype=torch.bfloat16)
    twin = Twin(None, model)
    twin.empty_cache()
    (blocks,) = scattered_blocks(1, 40)
    request = RequestSlice(request_id=0, token_ids=tuple(random_ids(40, seed=2)), context_len=0, block_ids=blocks)
    logits = twin.our_logits([request])
    assert logits.isfinite().all()
    assert float(logits.abs().max()) < 100
    assert len(set(logits.argmax(-1).tolist())) > 16
