"""A whole model with our Triton kernels computes what it computes with plain torch: prompts, context and decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from antiphon.comm import RankGroup, create_transport
from antiphon.core.batch import MicroBatch, RequestSlice
from antiphon.kernels.attention import AttentionBackend
from antiphon.kernels.attention.torch_backend import TorchBackend
from antiphon.kernels.attention.triton_backend import TritonBackend
from antiphon.models import attention_shape, build_model, expert_shape, fill_dummy_weights, read_config, run_micro_batch
from antiphon.models.decoder import Decoder
from antiphon.runtime import CpuStreams
from antiphon.splitting.micro_batches import build_micro_batch
from tests.models.twin import random_ids, tiny_config
from tests.support.interpreted import mend_interpreter

BLOCK_SIZE = 16
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only without a GPU")


class WithContext(TritonBackend):
    """In the dtype that can be interpreted, context is gathered: here it is read from the cache all the same."""

    prepared = 0
    contexts = 0

    @property
    def takes_context(self) -> bool:
        return not self.shape.latent

    def prepare(self, block_table_NB: torch.Tensor, seq_lens_N: torch.Tensor) -> object:  # type: ignore[override]
        self.prepared += 1
        return super().prepare(block_table_NB, seq_lens_N)

    def attend_context(self, *given: object) -> torch.Tensor:
        self.contexts += 1
        return super().attend_context(*given)  # type: ignore[arg-type]


def make_model(folder: Path, kind: str, kind_of_backend: type[AttentionBackend]) -> Decoder:
    tiny_config(kind).save_pretrained(folder)
    config = read_config(folder)
    transport = create_transport(
        "local",
        expert_shape(config, torch.float32),
        group=RankGroup(rank=0, size=1),
        streams=CpuStreams(),
        num_lanes=1,
    )
    backend = kind_of_backend(attention_shape(config), torch.float32, BLOCK_SIZE, CPU)
    model = build_model(config, transport, attention_backend=backend)
    fill_dummy_weights(model, seed=1)
    model.bind_kv_cache(torch.zeros(config.num_layers, 12, BLOCK_SIZE, config.kv_width))
    return model


def steps() -> list[MicroBatch]:
    """Two prompts; the rest of one of them beside a token of the other; a token of each, with padding."""
    ids = random_ids(60, seed=2)
    blocks = ((3, 7, 1), (8, 2, 9))

    def piece(request: int, start: int, stop: int) -> RequestSlice:
        return RequestSlice(
            request_id=request, token_ids=tuple(ids[start:stop]), context_len=start, block_ids=blocks[request]
        )

    batches = [
        [piece(0, 0, 17), piece(1, 0, 31)],
        [piece(0, 17, 35), piece(1, 31, 32)],
        [piece(0, 35, 36), piece(1, 32, 33)],
    ]
    return [
        build_micro_batch(batch, lane=0, rows_by_rank=(0,), block_size=BLOCK_SIZE, padded_to=5 if number == 2 else 0)
        for number, batch in enumerate(batches)
    ]


@torch.inference_mode()
def hidden_states(model: Decoder) -> list[torch.Tensor]:
    out = []
    for part in steps():
        part = replace(part, rows_by_rank=(part.token_ids_T.shape[0],))
        out.append(run_micro_batch(model, part)[: part.num_tokens])
    return out


@pytest.mark.parametrize("kind", ["qwen3-moe", "glm4-moe", "deepseek-v3"])
def test_a_model_with_our_kernels(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mend_interpreter(monkeypatch)
    expected = hidden_states(make_model(tmp_path, kind, TorchBackend))
    model = make_model(tmp_path, kind, WithContext)
    for out_TD, expected_TD in zip(hidden_states(model), expected, strict=True):
        torch.testing.assert_close(out_TD, expected_TD, rtol=1e-4, atol=1e-4)
    backend = model.backend
    assert isinstance(backend, WithContext)
    assert backend.prepared == 2, "once for each step that decodes"
    assert backend.contexts == (0 if backend.shape.latent else model.num_layers)
