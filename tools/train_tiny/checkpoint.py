"""Saving the model as a transformers checkpoint that other loaders of DeepSeek-V3 read too."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .tokenizer import BOS, EOS, PAD

if TYPE_CHECKING:
    from transformers import DeepseekV3ForCausalLM

MAX_SHARD_SIZE = "12MB"  # two shards, so that loaders are tried on more than one
# Keys of DeepSeek's own config.json that other loaders read; transformers ignores them.
DEEPSEEK_KEYS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_theta": 10000.0}


def save(hf: DeepseekV3ForCausalLM, out: Path) -> None:
    """Write a bfloat16 copy of the model into OUT, in place of the shards there; `hf` itself is not changed.

    The router's correction bias stays float32, as transformers keeps it.
    """
    from transformers import GenerationConfig

    model = copy.deepcopy(hf).to("cpu")
    for name, t in itertools.chain(model.named_parameters(), model.named_buffers()):
        if "e_score_correction_bias" not in name and t.dtype == torch.float32:
            t.data = t.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    model.save_pretrained(out, max_shard_size=MAX_SHARD_SIZE)
    path = out / "config.json"
    config = json.loads(path.read_text()) | DEEPSEEK_KEYS
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
