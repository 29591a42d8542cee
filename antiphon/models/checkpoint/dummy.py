"""Random weights in place of a checkpoint, for measurements of published shapes."""

from __future__ import annotations

import math
import zlib

import torch

from antiphon.models.causal_lm import CausalLM


@torch.no_grad()
def fill_dummy_weights(model: CausalLM, *, seed: int = 0) -> None:
    """Fill every weight of a model in place, by a generator on its own device.

    Norms are 1, biases 0, embeddings normal, other weights normal with deviation 1 / sqrt(inputs), a tenth of it for
    what is added to the hidden states: activations stay finite at any depth, and tokens stay different, as routing by
    the model needs it. Values depend on the seed, the checkpoint's name of the tensor and the kind of device: what
    all ranks hold is the same on all of them, and an expert is the same on whichever rank it is.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for name, tensor in model.checkpoint_tensors():
        if tensor.dim() == 1:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(tensor.device)
        generator = generators[tensor.device].manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        tensor.normal_(0.0, _deviation(name, tensor.shape[-1]), generator=generator)


def _deviation(name: str, num_inputs: int) -> float:
    if "embed_tokens" in name:
        return 1.0
    share = 0.1 if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")) else 1.0
    return share / math.sqrt(num_inputs)
