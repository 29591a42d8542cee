"""Random weights instead of a checkpoint, for benchmarks of published shapes."""

from __future__ import annotations

import math
import zlib

import torch

from antiphon.models.causal_lm import CausalLM


@torch.no_grad()
def fill_dummy_weights(model: CausalLM, *, seed: int = 0) -> None:
    """Fill every weight of a model in place, with a generator on its own device.

    Norms are 1, biases 0, embeddings standard normal. Other weights are normal with standard deviation
    1 / sqrt(inputs), or a tenth of it for projections into the residual. Activations stay finite at any depth, and
    tokens stay distinct, which the model's own routing needs.
    Values depend on the seed, the tensor's name in the checkpoint and the kind of device. So replicated weights are
    equal on all ranks, and an expert is the same whichever rank holds it.
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
