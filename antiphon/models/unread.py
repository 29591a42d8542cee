"""Checkpoint tensors that no rank reads: ignored, listed once, or refused.

If a layer, embedding, norm or head is read and the checkpoint has a tensor of it without a place in the model (a bias,
a norm, an expert, a scale), results would be wrong without it, so it is refused. `_harmless` finds the tensors that can
be ignored. One sentence lists the rest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Set
from typing import NamedTuple

from antiphon.core.errors import ModelError
from antiphon.models.checkpoint.block_fp8 import scale_name
from antiphon.models.checkpoint.files import Checkpoint
from antiphon.models.config import ConfigFile
from antiphon.models.decoder import HEAD_NAME, DecoderConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_READ_BESIDE_LAYERS = ("model.embed_tokens.", "model.norm.", "lm_head.")
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # older checkpoints keep these buffers
_CACHE_SCALES = (".k_scale", ".v_scale")  # of a float8 KV cache; this one is never quantized
_PREDICTS = ".eh_proj.weight"  # only in layers for multi-token prediction
_MOST_GROUPS = 4


class _Meaning(NamedTuple):
    pattern: str
    what: str
    remedy: str = "use the config.json that was published with these weights"


_MEANINGS = (
    _Meaning("lora_", "an adapter", "merge it into the weights first"),
    _Meaning(
        r"qweight|qzeros|g_idx|zero_point|weight_packed|absmax|quant_|SCB$|scales?(_\w+)?$",
        "part of a quantized weight",
        "use the config.json that was published with these weights, or a bfloat16 checkpoint",
    ),
    _Meaning(r"\.e_score_correction_bias$", "a correction of the router"),
    _Meaning(r"\.bias$", "a bias"),
    _Meaning("norm", "a norm"),
    _Meaning("sink", "an attention sink"),
    _Meaning("shared_expert", "a weight of shared experts"),
    _Meaning("", "a weight"),
)


def check_unread(checkpoint: Checkpoint, config: DecoderConfig, read: Set[str]) -> str:
    """One sentence about tensors that are neither read nor known to be harmless; empty if there are none.

    read: names of all tensors of the model. Raises `ModelError` for tensors without which results would be wrong.
    """
    unread = checkpoint.names() - read - {scale_name(name) for name in read}
    unread -= _harmless(unread, checkpoint, config)
    in_read_parts = {name for name in unread if _is_of_a_read_part(name, config)}
    refused = sorted(name for name in in_read_parts if not _is_empty(name, checkpoint))
    if refused:
        raise _refusal(refused, checkpoint, config)
    others = sorted(unread - in_read_parts)
    return _listing(others, checkpoint) if others else ""


def _harmless(names: Collection[str], checkpoint: Checkpoint, config: DecoderConfig) -> set[str]:
    """Tensors of layers that are not loaded or for multi-token prediction, recomputed buffers, and a tied head.

    The head of tied embeddings is a copy of the embedding, which `match_checkpoint` has verified.
    """
    num_published = ConfigFile(checkpoint.folder / "config.json").count("num_hidden_layers")
    predicting = {_layer_of(name) for name in names if name.endswith(_PREDICTS)}

    def is_harmless(name: str) -> bool:
        layer = _layer_of(name)
        if layer is not None and layer >= config.num_layers:
            return layer < num_published or layer in predicting
        if name == HEAD_NAME:
            return config.tied_embeddings and name in checkpoint
        return name.endswith(_CACHE_SCALES) or _COMPUTED.search(name) is not None

    return {name for name in names if is_harmless(name)}


def _layer_of(name: str) -> int | None:
    found = _LAYER.match(name)
    return None if found is None else int(found[1])


def _is_of_a_read_part(name: str, config: DecoderConfig) -> bool:
    layer = _layer_of(name)
    if layer is not None:
        return layer < config.num_layers
    return name.startswith(_READ_BESIDE_LAYERS) or "lora_" in name


def _is_empty(name: str, checkpoint: Checkpoint) -> bool:
    """Whether the tensor has no elements, as weights of zero shared experts may be stored."""
    return name in checkpoint and not checkpoint.stored(name).num_bytes


def _refusal(names: list[str], checkpoint: Checkpoint, config: DecoderConfig) -> ModelError:
    name = names[0]
    others = f" (and {len(names) - 1} more such tensors)" if len(names) > 1 else ""
    meaning = next(meaning for meaning in _MEANINGS if re.search(meaning.pattern, name))
    what, expert = meaning.what, _EXPERT.search(name)
    if expert is not None and int(expert[1]) >= config.num_experts:
        what = f"a weight of an expert numbered above the {config.num_experts} in config.json"
    return ModelError(
        f"checkpoint {checkpoint.folder} has {name!r}{others}, {what} that the model of its config.json does not have",
        limit="results without it would be wrong",
        remedy=meaning.remedy,
    )


def _listing(names: list[str], checkpoint: Checkpoint) -> str:
    """A sentence with the names, grouping those that differ only in numbers, largest group first."""
    first_of: dict[str, str] = {}
    sizes: Counter[str] = Counter()
    for name in names:
        kind = re.sub(r"\d+", "*", name)
        first_of.setdefault(kind, name)
        sizes[kind] += 1
    shown = [first_of[kind] if size == 1 else f"{kind} ({size})" for kind, size in sizes.most_common(_MOST_GROUPS)]
    more = ", ..." if len(sizes) > _MOST_GROUPS else ""
    count = "1 tensor of the checkpoint is" if len(names) == 1 else f"{len(names)} tensors of the checkpoint are"
    return f"{checkpoint.folder}: {count} not read: {', '.join(shown)}{more}"
