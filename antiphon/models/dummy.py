"""Random weights in place of a checkpoint, for measurements of published shapes."""

from __future__ import annotations

import zlib

import torch

from antiphon.models.causal_lm import CausalLM

__all__ = ["fill_dummy_weights"]


@torch.no_grad()
def fill_dummy_weights(model: CausalLM, *, seed: int = 0) -> None:
    """Fill every weight of a model in place, by a generator on its own device.

    Norms are 1, biases 0, embeddings normal, other weights normal with variance 1 / inputs, so that activations stay
    finite at any depth. Values depend on the seed, the checkpoint's name of the tensor and the kind of device: what
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
        tensor.normal_(0.0, 1.0 if "embed_tokens" in name else tensor.shape[-1] ** -0.5, generator=generator)
