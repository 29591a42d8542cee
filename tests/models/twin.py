"""Random tiny models of transformers, saved as checkpoints, and Antiphon's models loaded from them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from antiphon.comm import RankGroup, create_transport
from antiphon.core.batch import Batch, MicroBatch, RequestSlice, use_micro_batch
from antiphon.core.plan import Plan
from antiphon.models import build_model, expert_shape, load_weights, match_checkpoint, read_config
from antiphon.models.decoder import Decoder
from antiphon.runtime import CpuStreams, Streams, run_lanes, streams_for
from antiphon.splitting import join, split

__all__ = [
    "KINDS",
    "Twin",
    "change_tensors",
    "load_theirs",
    "random_checkpoint",
    "random_ids",
    "relative_error",
    "rewrite_config",
    "stored_tensors",
    "tiny_config",
]

BLOCK_SIZE = 4
_NUM_BLOCKS = 40
_MAX_LANES = 3

_DEEPSEEK_V3: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_shared_experts": 1,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
    "q_lora_rank": 14,
    "kv_lora_rank": 18,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10,
    "v_head_dim": 9,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "num_mtp_layers": 0,
}


_DEEPSEEK_V2 = _DEEPSEEK_V3 | {"topk_method": "greedy", "norm_topk_prob": False, "rms_norm_eps": 1e-5}

_QWEN3_MOE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}

_GLM4_MOE: dict[str, Any] = {key: value for key, value in _QWEN3_MOE.items() if key != "num_experts"} | {
    "head_dim": 12,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "use_qk_norm": False,
    "num_nextn_predict_layers": 0,
}

_MIXTRAL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 12,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}


class _Kind(NamedTuple):
    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    sizes: dict[str, Any]


_KINDS = {
    "deepseek-v3": _Kind(DeepseekV3Config, DeepseekV3ForCausalLM, _DEEPSEEK_V3),
    "deepseek-v2": _Kind(DeepseekV2Config, DeepseekV2ForCausalLM, _DEEPSEEK_V2),
    "qwen3-moe": _Kind(Qwen3MoeConfig, Qwen3MoeForCausalLM, _QWEN3_MOE),
    "glm4-moe": _Kind(Glm4MoeConfig, Glm4MoeForCausalLM, _GLM4_MOE),
    "mixtral": _Kind(MixtralConfig, MixtralForCausalLM, _MIXTRAL),
}

KINDS = tuple(_KINDS)


def tiny_config(kind: str = "deepseek-v3", **changes: Any) -> PretrainedConfig:
    """The configuration of a small model, with the name of its architecture."""
    names = {"architectures": [_KINDS[kind].model.__name__]}
    return _KINDS[kind].config(**deepcopy(_KINDS[kind].sizes | names | changes))  # it writes into what it is given


def random_checkpoint(
    folder: Path, *, kind: str = "deepseek-v3", seed: int = 1, max_shard_size: str = "5GB", **changes: Any
) -> PreTrainedModel:
    """A model whose every weight matters (norms, biases and corrections too), saved in `folder`."""
    config = tiny_config(kind, **changes)
    config._attn_implementation = config._experts_implementation = "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no shared experts are weights of size zero there
        model = _KINDS[kind].model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not name.endswith("inv_freq"):
                tensor.copy_(_random_weight(name, tensor.shape, generator))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def load_theirs(folder: Path, kind: str) -> PreTrainedModel:
    """What transformers makes of the files in `folder`."""
    return _KINDS[kind].model.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The names in all safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Write the single file again with some tensors replaced or (`None`) left out."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.3 * values
    if len(shape) == 1:
        return 0.2 * values
    return values if "embed" in name else values * 1.2 / max(shape[-1], 1) ** 0.5


def random_ids(count: int, *, seed: int, vocab_size: int = _DEEPSEEK_V3["vocab_size"]) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()


def rewrite_config(folder: Path, *, remove: Sequence[str] = (), **changes: Any) -> None:
    """Change keys of `config.json`."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in remove}))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@dataclass(slots=True)
class Twin:
    """Both models over the same weights; ours is one rank's, on any device, with an empty cache full of NaN."""

    theirs: PreTrainedModel | None  # None: only ours is asked
    ours: Decoder
    streams: Streams = field(default_factory=CpuStreams)
    rank: int = 0

    @staticmethod
    def load(
        theirs: PreTrainedModel | None,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        group: RankGroup | None = None,
        transport: str = "auto",
    ) -> Twin:
        group = group or RankGroup(rank=0, size=1)
        streams = streams_for(torch.device(device))
        matched = match_checkpoint(read_config(folder), folder)
        config = matched.config
        ours = build_model(
            config,
            create_transport(
                transport, expert_shape(config, dtype), group=group, streams=streams, num_lanes=_MAX_LANES
            ),
        )
        load_weights(matched.checkpoint, ours.checkpoint_tensors())
        twin = Twin(theirs, ours, streams, group.rank)
        twin.empty_cache()
        return twin

    def empty_cache(self) -> None:
        config = self.ours.config
        dtype = self.ours.embed_tokens.weight.dtype
        shape = (config.num_layers, _NUM_BLOCKS, BLOCK_SIZE, config.kv_width)
        self.ours.bind_kv_cache(torch.full(shape, float("nan"), dtype=dtype, device=self.streams.device))

    @torch.inference_mode()
    def their_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[S, V] of one text, without a cache."""
        assert self.theirs is not None
        return self.theirs(torch.tensor([list(token_ids)])).logits[0]

    @torch.inference_mode()
    def our_logits(self, requests: Sequence[RequestSlice], cuts: Sequence[int] = ()) -> torch.Tensor:
        """[T, V] of a batch that is cut before the tokens `cuts`, one lane a part."""
        edges = [0, *cuts, sum(request.query_len for request in requests)]
        return self.logits_of_parts(requests, (tuple(stop - start for start, stop in pairwise(edges)),))

    @torch.inference_mode()
    def logits_of_parts(
        self, requests: Sequence[RequestSlice], part_tokens: tuple[tuple[int, ...], ...]
    ) -> torch.Tensor:
        """The same, with the tokens of every part of all ranks, each of which must call it."""
        plan = Plan(part_tokens=part_tokens, reason="test")
        parts = split(Batch(rank=self.rank, requests=tuple(requests)), plan, block_size=BLOCK_SIZE)
        lanes = [partial(self._forward, part.to(self.streams.device)) for part in parts]
        return self.ours.logits(join(run_lanes(lanes, streams=self.streams))).cpu()

    def _forward(self, part: MicroBatch) -> torch.Tensor:
        with use_micro_batch(part):
            return self.ours(part.token_ids_T, part.positions_T)


def scattered_blocks(num_requests: int, num_tokens: int) -> Iterator[tuple[int, ...]]:
    """For each request the blocks of its text, neither adjacent nor in order; block 0 is nobody's."""
    order = torch.randperm(_NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(3)) + 1
    needed = -(-num_tokens // BLOCK_SIZE)
    for number in range(num_requests):
        yield tuple(order[number * needed : (number + 1) * needed].tolist())
