"""What each rank runs in `antiphon bench overlap`: one model, every transport, the arms S, C, M, D and C2 interleaved.

    for repeat:                 S   serial, whole
        for transport:          C   serial, no link      after S, which leaves the buffers and counts of this cut
            S  C  M  D  C2      M   serial, link only    the transport's calls alone; after S for the same reason
                                D   split, whole
                                C2  split, no link       after D

All arms use the same routes: M sends along the routes that the routers chose in S. Every S and D is compared with the
first S of the first transport, outside the timed region.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from antiphon.bench.arm_clock import ArmClock, tell
from antiphon.bench.parts import TransportPart, part_of
from antiphon.comm import RankGroup, Routes, Transport, create_transport
from antiphon.config.engine_config import DTYPES
from antiphon.core.batch import Batch, MicroBatch, RequestSlice
from antiphon.core.bundled import BUNDLED_MODEL, bundled_model
from antiphon.core.errors import OptionError
from antiphon.core.plan import Plan
from antiphon.device.table import device_of
from antiphon.engine.cache.kv_cache import allocate_cache
from antiphon.engine.runner import Runner
from antiphon.machine.versions import versions
from antiphon.models import CausalLM, build_model, expert_shape, fill_dummy_weights, parse_routing, read_config
from antiphon.models.moe import Experts, MoELayer
from antiphon.runtime import finish, run_lanes, streams_for
from antiphon.splitting import find_cut, join, split

ARMS = ("S", "C", "M", "D", "C2")
_WARM_UPS = 2
_BLOCK_SIZE = 16


def use_transport(model: CausalLM, transport: Transport) -> None:
    """Make all experts of `model` use `transport`. Call it only between steps."""
    for module in cast("nn.Module", model).modules():
        if isinstance(module, Experts):
            module.transport = transport


def relative_errors(value_TD: torch.Tensor, expected_TD: torch.Tensor) -> tuple[float, float]:
    """|value - expected| / |expected| over all tokens, and the largest of any token. Infinite if one is not finite."""
    wide = torch.promote_types(value_TD.dtype, torch.float32)
    expected = expected_TD.to(wide)
    difference = value_TD.to(wide) - expected
    whole = float(difference.norm() / expected.norm())
    worst = float((difference.norm(dim=-1) / expected.norm(dim=-1)).max())
    return (whole, worst) if math.isfinite(whole + worst) else (math.inf, math.inf)


class Trial:
    """The model of one rank, its transports, and the steps to measure."""

    def __init__(self, group: RankGroup, device: torch.device, options: dict[str, Any]) -> None:
        self.group = group
        self.options = options
        self.streams = streams_for(device)
        source = bundled_model() if options["model"] == BUNDLED_MODEL else options["model"]
        self.config = read_config(source, num_layers=options["num_layers"])
        dtype = DTYPES[options["dtype"]]
        max_tokens = max(options["tokens"])
        if min(options["seq_len"], max_tokens) > self.config.max_positions:
            raise OptionError(
                f"--seq-len {options['seq_len']} is too long",
                limit=f"the model has {self.config.max_positions} positions",
                remedy=f"use at most {self.config.max_positions}",
                option="seq-len",
            )
        shape = expert_shape(self.config, dtype)
        self.transports = {
            name: create_transport(
                name,
                shape,
                group=group,
                streams=self.streams,
                num_lanes=options["micro_batches"],
                max_tokens=max_tokens,
                peer_access=options["peer_access"],
            )
            for name in options["transports"]
        }
        first = next(iter(self.transports.values()))
        self.model = build_model(self.config, first, routing=parse_routing(options["routing"]))
        fill_dummy_weights(self.model, seed=options["seed"])
        modules = list(cast("nn.Module", self.model).modules())
        self.moe_layers = [module for module in modules if isinstance(module, MoELayer)]
        if not self.moe_layers:
            raise OptionError(
                f"--num-layers {options['num_layers']} leaves no MoE layer",
                remedy="use more layers",
                option="num-layers",
            )
        self.model.bind_kv_cache(
            allocate_cache(
                self.config, num_blocks=_num_blocks(options), block_size=_BLOCK_SIZE, dtype=dtype, device=device
            )
        )
        self.runner = Runner(self.model, streams=self.streams)

    def parts(self, num_tokens: int, num_lanes: int) -> list[MicroBatch]:
        """The micro-batches of a step of `num_tokens` tokens on every rank, on the device."""
        batch = self._batch(num_tokens)
        cut = find_cut(batch.query_lens, num_parts=num_lanes, rule="token")
        if len(cut.part_tokens) < num_lanes:
            raise OptionError(
                f"--tokens {num_tokens} cannot be cut into {num_lanes} parts", limit=cut.refusal.text, option="tokens"
            )
        plan = Plan(part_tokens=(cut.part_tokens,) * self.group.size, reason="as measured")
        device, pins = self.streams.device, self.streams.owner.pinned_memory
        return [part.to(device, pin_memory=pins) for part in split(batch, plan, block_size=_BLOCK_SIZE)]

    def run_step(self, parts: Sequence[MicroBatch]) -> list[torch.Tensor]:
        return self.runner.run(parts)

    def run_link(self, transport: Transport, x_TD: torch.Tensor, routes: Sequence[Routes]) -> list[None]:
        """Dispatch and combine for every MoE layer on one lane, with nothing in between."""
        tokens_by_rank = (x_TD.shape[0],) * self.group.size

        def layers() -> None:
            for layer in routes:
                rows = finish(transport.dispatch(x_TD, layer, tokens_by_rank=tokens_by_rank))
                finish(transport.combine(rows.x_RD if rows.out_RD is None else rows.out_RD))

        with torch.inference_mode():
            return run_lanes([layers], streams=self.streams)

    @contextmanager
    def routes_of_layers(self) -> Iterator[list[Routes]]:
        """A list that collects the routers' results while steps run in the context."""
        routes: list[Routes] = []

        def keep(_module: nn.Module, _inputs: object, output: Routes) -> None:
            routes.append(output)

        handles = [layer.gate.register_forward_hook(keep) for layer in self.moe_layers]
        try:
            yield routes
        finally:
            for handle in handles:
                handle.remove()

    def _batch(self, num_tokens: int) -> Batch:
        generator = torch.Generator().manual_seed(self.options["seed"] * self.group.size + self.group.rank)
        token_ids = torch.randint(self.config.vocab_size, (num_tokens,), generator=generator).tolist()
        requests: list[RequestSlice] = []
        block = 1
        for start in range(0, num_tokens, self.options["seq_len"]):
            text = tuple(token_ids[start : start + self.options["seq_len"]])
            num_blocks = -(-len(text) // _BLOCK_SIZE)
            blocks = tuple(range(block, block + num_blocks))
            requests.append(RequestSlice(request_id=len(requests), token_ids=text, context_len=0, block_ids=blocks))
            block += num_blocks
        return Batch(rank=self.group.rank, requests=tuple(requests))


def _num_blocks(options: dict[str, Any]) -> int:
    """Enough blocks for the largest step; block 0 is for padding."""
    seq_len: int = options["seq_len"]
    most: int = max(-(-tokens // seq_len) * -(-min(tokens, seq_len) // _BLOCK_SIZE) for tokens in options["tokens"])
    return 1 + most


def measure_steps(group: RankGroup, device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """Measure every number of tokens. options: fields of `OverlapOptions`. Times are in ms, one per repeat."""
    trial = Trial(group, device, options)
    clock = ArmClock(group, device)
    config = trial.config
    tell(group, f"model and {len(trial.transports)} transports ready")
    steps = []
    for num_tokens in options["tokens"]:
        steps.append({"tokens": num_tokens, "transports": _measure(trial, clock, num_tokens)})
        tell(group, f"measured steps of {num_tokens} tokens")
    return {
        "device": device_of(device).describe(),
        "versions": versions(),
        "model": {
            "architecture": config.architecture,
            "layers": config.num_layers,
            "moe_layers": len(trial.moe_layers),
            "hidden_size": config.hidden_size,
            "experts": config.num_experts,
            "top_k": config.top_k,
        },
        "steps": steps,
    }


def _measure(trial: Trial, clock: ArmClock, num_tokens: int) -> dict[str, dict[str, Any]]:
    """All arms of all transports interleaved, for one number of tokens."""
    serial, dual = (trial.parts(num_tokens, lanes) for lanes in (1, trial.options["micro_batches"]))
    shape = next(iter(trial.transports.values())).shape
    x_TD = torch.randn(num_tokens, shape.hidden_size, device=trial.streams.device).to(shape.dtype)
    routes: list[Routes] = []
    reference_TD: torch.Tensor | None = None
    cells = {name: _empty_cell() for name in trial.transports}
    for repeat in range(_WARM_UPS + trial.options["repeats"]):
        for name, transport in trial.transports.items():
            if not routes:
                use_transport(trial.model, transport)
                with trial.routes_of_layers() as routes:
                    trial.run_step(serial)
            compute, link = (part_of(transport, part) for part in (TransportPart.COMPUTE_ONLY, TransportPart.LINK_ONLY))
            arms: dict[str, tuple[Transport, Callable[[], Any]]] = {
                "S": (transport, partial(trial.run_step, serial)),
                "C": (compute, partial(trial.run_step, serial)),
                "M": (link, partial(trial.run_link, link, x_TD, routes)),
                "D": (transport, partial(trial.run_step, dual)),
                "C2": (compute, partial(trial.run_step, dual)),
            }
            cell = cells[name]
            for arm in ARMS:
                used, run = arms[arm]
                use_transport(trial.model, used)
                trial.runner.reserved_sms = transport.num_sms if arm == "D" else 0
                timed = clock.measure(run)
                if arm in ("S", "D"):
                    hidden_TD = join(timed.result)
                    reference_TD = hidden_TD.clone() if reference_TD is None else reference_TD
                    errors = relative_errors(hidden_TD, reference_TD)
                    cell["errors"][arm] = [max(old, new) for old, new in zip(cell["errors"][arm], errors, strict=True)]
                if repeat >= _WARM_UPS:
                    cell["ms"][arm].append(timed.elapsed_ms)
                    cell["host_ms"][arm].append(timed.host_ms)
    return cells


def _empty_cell() -> dict[str, Any]:
    return {
        "ms": {arm: [] for arm in ARMS},
        "host_ms": {arm: [] for arm in ARMS},
        "errors": {arm: [0.0, 0.0] for arm in ("S", "D")},  # over all tokens, and of the worst one
    }
