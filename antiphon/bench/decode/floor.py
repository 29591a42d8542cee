"""The least time of a decode step: the bytes that it must read, at the bandwidth of a copy on the same device.

    weights of all layers and of the head, once     + experts that at least one token chose
                                                    + keys and values of all sequences

Every lane of a split step reads the layers again. Activations, and the time of exchanges, are left out: a step cannot
be faster than this, and one on several ranks will not quite reach it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from antiphon.bench.measures import gigabytes_per_s
from antiphon.device.device import Device
from antiphon.models.decoder import Decoder
from antiphon.models.moe import Experts, MoELayer

_COPIES = 10
_WARM_UPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """The sizes of one rank's part of a model, in bytes."""

    layers: int  # all weights of the layers but the routed experts, and the last norm
    head: int
    expert: int  # one expert of one layer
    cached_token: int  # keys and values of one token, over all layers
    num_local_experts: int  # of one layer
    num_experts: int
    top_k: int
    num_moe_layers: int

    @staticmethod
    def of(model: Decoder, *, kv_itemsize: int) -> ModelBytes:
        """Count them. The embedding counts only where it is the head too, because a step reads few of its rows."""
        experts = [layer.mlp.experts for layer in model.decoder_layers() if isinstance(layer.mlp, MoELayer)]
        routed = sum(tensor.nbytes for module in experts for tensor in module.parameters())
        head = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
        beside = [model.embed_tokens.weight] if model.lm_head is None else [model.embed_tokens.weight, head]
        everything = sum(tensor.nbytes for tensor in model.parameters())
        config = model.config
        return ModelBytes(
            layers=everything - routed - sum(tensor.nbytes for tensor in beside),
            head=head.nbytes,
            expert=_expert_bytes(experts[0]) if experts else 0,
            cached_token=config.num_layers * config.kv_width * kv_itemsize,
            num_local_experts=experts[0].gate_up_EGD.shape[0] if experts else 0,
            num_experts=config.num_experts,
            top_k=config.top_k,
            num_moe_layers=len(experts),
        )


def _expert_bytes(experts: Experts) -> int:
    return experts.gate_up_EGD[0].nbytes + experts.down_EDF[0].nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBytes:
    """What one rank must read in a step, in bytes."""

    layers: float
    head: float
    experts: float
    cache: float

    @property
    def total(self) -> float:
        return self.layers + self.head + self.experts + self.cache


def chosen_share(num_tokens: int, *, num_experts: int, top_k: int) -> float:
    """The expected share of the experts that at least one of the tokens chose, each its `top_k` uniformly."""
    return 1 - (1 - top_k / num_experts) ** num_tokens


def step_bytes(model: ModelBytes, *, sequences: int, context: float, num_ranks: int, num_lanes: int) -> StepBytes:
    """The bytes of a step of `sequences` on each rank, under uniform routing. context: tokens that each attends to."""
    lanes = [sequences // num_lanes + (lane < sequences % num_lanes) for lane in range(num_lanes)]
    shares = sum(chosen_share(num_ranks * tokens, num_experts=model.num_experts, top_k=model.top_k) for tokens in lanes)
    return StepBytes(
        layers=num_lanes * model.layers,
        head=model.head,
        experts=shares * model.num_local_experts * model.expert * model.num_moe_layers,
        cache=sequences * context * model.cached_token,
    )


def copy_bandwidth(device: Device, num_bytes: int) -> float:
    """Bytes read and written per second by an elementwise kernel over `num_bytes` of input; the median of several."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device.torch_device)
    target = torch.empty_like(source)
    timer = device.timer()
    found = []
    for _ in range(_WARM_UPS + _COPIES):
        timer.start()
        torch.neg(source, out=target)
        bandwidth = gigabytes_per_s(2 * source.nbytes, timer.elapsed_ms(timer.stop()))
        assert bandwidth is not None, "a copy took no time"
        found.append(bandwidth * 1e9)
    del source, target
    device.release_unused()
    return float(statistics.median(found[_WARM_UPS:]))
