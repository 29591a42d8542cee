"""The optimizers: Muon for the matrices, AdamW for embeddings, norms and routers.

Muon is by Keller Jordan et al. (2024), the Newton-Schulz coefficients are those of the modded-nanogpt project, and the
scale of the update is that of "Muon is Scalable for LLM Training" (Liu et al., 2025).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DeepseekV3ForCausalLM

# Coefficients (a, b, c) of the five Newton-Schulz steps x <- a x + (b s + c s s) x with s = x x^T.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
Shape = tuple[int, int]


class Muon:
    """Momentum orthogonalised by Newton-Schulz (Muon), for the matrices; equal shapes are done in one batch.

    `params` are pairs (parameter, (rows, cols)); a parameter holds one or more matrices of that shape. The update has
    the root mean square that AdamW's has at the same learning rate (factor 0.2 * sqrt(max side)).
    """

    def __init__(self, params: list[tuple[Tensor, Shape]], momentum: float = 0.95, weight_decay: float = 0.1):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[Shape, list[Tensor]] = {}
        for p, shape in params:
            self.groups.setdefault(shape, []).append(p)
        self.buffers = {
            shape: torch.zeros(sum(map(torch.numel, ps)) // (shape[0] * shape[1]), *shape, device=ps[0].device)
            for shape, ps in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all parameters in place from their gradients."""
        for shape, ps in self.groups.items():
            grad = torch.cat([p.grad.view(-1, *shape) for p in ps])  # [matrices, rows, cols]
            buffer = self.buffers[shape].lerp_(grad, 1 - self.momentum)
            x = grad.lerp_(buffer, self.momentum).bfloat16()
            is_tall = shape[0] > shape[1]
            x = x.mT if is_tall else x
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for a, b, c in NEWTON_SCHULZ:
                s = x @ x.mT
                x = a * x + (b * s + c * (s @ s)) @ x
            x = (x.mT if is_tall else x).float() * (0.2 * max(shape) ** 0.5)
            updates = x.split([p.numel() // (shape[0] * shape[1]) for p in ps])
            for p, update in zip(ps, updates, strict=True):
                p.mul_(1 - lr * self.weight_decay).add_(update.reshape(p.shape), alpha=-lr)


class Optimizers:
    """Muon and AdamW over all parameters of the model; the routers' learning rate is a quarter of the others'."""

    def __init__(self, hf: DeepseekV3ForCausalLM, peak_lr: float):
        matrices, embeddings, routers, norms = [], [], [], []
        for name, p in hf.named_parameters():
            if p.dim() < 2:
                norms.append(p)
            elif name.endswith("mlp.gate.weight"):
                routers.append(p)
            elif "embed_tokens" in name:
                embeddings.append(p)
            elif name.endswith("gate_up_proj"):  # gate and up are two matrices
                matrices.append((p, (p.shape[1] // 2, p.shape[2])))
            else:
                matrices.append((p, tuple(p.shape[-2:])))
        self.muon = Muon(matrices)
        self.adamw = torch.optim.AdamW(
            [
                {"params": embeddings, "scale": 1.0, "weight_decay": 0.01},
                {"params": routers, "scale": 0.25, "weight_decay": 0.1},
                {"params": norms, "scale": 1.0, "weight_decay": 0.0},
            ],
            lr=peak_lr,
            betas=(0.9, 0.98),
            eps=1e-10,
            fused=hf.device.type == "cuda",
        )

    def step(self, lr: float) -> None:
        """Update all parameters in place from their gradients."""
        self.muon.step(lr)
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["scale"]
        self.adamw.step()
