"""`build_engine` assembles the parts of one rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from antiphon.comm import (
    Mesh,
    RankGroup,
    Refusal,
    Transport,
    World,
    create_transport,
    load_transport,
    parse_transport,
    refused,
)
from antiphon.comm.slab.transport import slab_bytes
from antiphon.config.engine_config import ResolvedConfig
from antiphon.config.graph_sizes import CaptureReport
from antiphon.config.memory import is_out_of_memory
from antiphon.core.errors import AntiphonError, OptionError, first_line
from antiphon.device.table import rank_device
from antiphon.engine.cache.block_pool import BlockPool
from antiphon.engine.cache.kv_cache import allocate_cache, measured_cache
from antiphon.engine.graphs.build import make_padded_steps, measure_decode, measured_graphs, most_rows
from antiphon.engine.graphs.padded_steps import Ladders
from antiphon.engine.messages import LOADING, Ready, Starting
from antiphon.engine.runner import Runner
from antiphon.engine.sampling.new_tokens import NewTokens
from antiphon.engine.sampling.sampler import Sampler
from antiphon.engine.scheduling.scheduler import Scheduler
from antiphon.engine.stats import ExpertLoad, StepStats
from antiphon.engine.step import StepEngine
from antiphon.kernels.attention import AttentionBackend, choose_backend
from antiphon.kernels.dispatch import no_cuda_kernels
from antiphon.machine.advice import format_bytes
from antiphon.machine.probe import examine_machine
from antiphon.models import (
    CausalLM,
    attention_shape,
    build_model,
    expert_shape,
    fill_dummy_weights,
    load_weights,
    weight_bytes,
)
from antiphon.planning import Conditions, Planner, resolve_policy
from antiphon.runtime import Streams
from antiphon.timeline import StepRecorder

logger = logging.getLogger("antiphon.engine")


def build_engine(
    config: ResolvedConfig,
    group: RankGroup,
    *,
    report: Callable[[Starting], None] = lambda starting: None,
    meet: Callable[[], None] = lambda: None,
    mesh: Mesh | None = None,
) -> StepEngine:
    """Load this rank's weights, allocate its KV cache, and make its step engine. All ranks must call it together.

    report: called at every stage, and many times while weights are read. meet: returns when all ranks have their
    weights; without it they wait in their next exchange, for as long as the group's time limit allows.
    mesh: how the ranks of `group` work together; by default, the mesh of the options.
    """
    options = config.options
    mesh = options.mesh if mesh is None else mesh
    _check_mesh(mesh, group)
    device = rank_device(config.device_kind, group.rank)
    device.activate()
    streams = device.streams(own_compute=True)
    with streams.current():
        return _build(config, group, mesh, streams, report, meet)


def _build(
    config: ResolvedConfig,
    group: RankGroup,
    mesh: Mesh,
    streams: Streams,
    report: Callable[[Starting], None],
    meet: Callable[[], None],
) -> StepEngine:
    """`build_engine`, with the compute stream current."""
    options, device = config.options, streams.owner
    axes, replica = mesh.groups(group), mesh.place(group.rank).dp
    report(Starting(what="making the transport"))
    transport = make_transport(config, axes.ep, streams)
    report(Starting(what=LOADING))
    backend, reason = _attention_backend(config, streams)
    model = _load(config, transport, backend, report)
    report(Starting(what="waiting until all ranks have loaded"))
    meet()
    obstacle = _capture_obstacle(config, transport, model)
    sizing = "running the largest step, to size the KV cache"
    report(Starting(what=sizing if config.cache is None else "making the KV cache"))
    ladders: Ladders = {} if obstacle and device.capturable else config.ladders
    with torch.inference_mode():
        num_rows = mesh.ep * config.max_num_batched_tokens
        experts = model.prepare_experts(num_rows, group.all_gather_object)
    if experts:
        logger.info("%s", experts)
    # Requests that decode beside prompts, which the largest step has none of, in one lane or in several.
    beside_bytes = model.decode_bytes(options.max_num_seqs, -(-config.max_model_len // options.block_size))
    if config.cache is None and ladders and device.capturable:
        beside_bytes += measured_graphs(config, model, transport, ladders, group)
    cache = config.cache or measured_cache(config, model, streams=streams, group=group, beside_bytes=beside_bytes)
    model.bind_kv_cache(
        allocate_cache(
            config.model,
            num_blocks=cache.num_blocks,
            block_size=options.block_size,
            dtype=config.dtype,
            device=device.torch_device,
        )
    )
    if options.debug_order:
        group.record_order()
    scheduler = Scheduler(
        BlockPool(cache.num_blocks, options.block_size, prefix_caching=options.prefix_caching),
        rank=replica,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=config.model.eos_token_ids,
        chunked_prefill=options.chunked_prefill,
    )
    recorder = StepRecorder()
    runner = Runner(model, streams=streams, recorder=recorder)
    runner.reserved_sms = transport.num_sms
    new_tokens = NewTokens(most_rows(config, ladders), streams)
    padded = make_padded_steps(config, model, runner, transport, new_tokens, ladders)
    expert_load = ExpertLoad(model, num_experts=config.model.num_experts, num_ranks=mesh.ep, device=device.torch_device)
    captured = CaptureReport(sizes=ladders, obstacle=obstacle)
    if padded is not None and device.capturable:
        with expert_load.attached():
            captured = padded.capture(
                ladders,
                group,
                report=lambda done, of: report(Starting(what=f"capturing decode steps, {done} of {of}")),
            )
        ladders = padded.ladders
        transport.freeze()
        model.freeze()
    conditions = Conditions(device_kind=config.device_kind, data_path=transport.data_path, decode_measured=True)
    measured = None
    if padded is not None and captured.num_graphs and resolve_policy(options.policy, conditions).policy.measures_decode:
        report(Starting(what="measuring decode steps"))
        measured = measure_decode(padded, config, cache, group, transport)
        if measured is not None:
            captured = replace(captured, measured=measured.describe())
    conditions = replace(conditions, decode_measured=measured is not None)
    policy = resolve_policy(options.policy, conditions).policy
    return StepEngine(
        group=group,
        scheduler=scheduler,
        planner=Planner(policy, ladders, measured),
        runner=runner,
        padded=padded,
        timer=device.timer() if device.queues else None,
        captured=captured,
        sampler=Sampler(
            model.logits,
            scheduler.requests,
            new_tokens=new_tokens if device.queues and options.async_scheduling else None,
            vocab_size=config.model.vocab_size,
            eos_token_ids=config.model.eos_token_ids,
            pin_memory=device.pinned_memory,
        ),
        transport=transport,
        cache=cache,
        attention=f"{backend.name}: {reason}",
        recorder=recorder,
        stats=StepStats(options.policy.micro_batches, obstacle=captured.obstacle),
        expert_load=expert_load,
    )


def _capture_obstacle(config: ResolvedConfig, transport: Transport, model: CausalLM) -> str:
    """Why decode steps are eager; "" if they are captured."""
    if config.options.enforce_eager:
        return "enforce_eager is set"
    if not transport.streams.owner.capturable:
        return f"work on {config.device_kind} cannot be captured"
    if transport.capture_obstacle:
        return f"transport {transport.name} cannot be captured: {transport.capture_obstacle}"
    return model.capture_obstacle


def _check_mesh(mesh: Mesh, group: RankGroup) -> None:
    """Raise `OptionError` if the engine cannot run this mesh yet, or if its number of ranks is not the group's."""
    if mesh.tp > 1:
        raise OptionError(
            f"tp={mesh.tp} is not supported",
            limit="attention cannot be split over ranks: tensor-parallel projections and their collectives are missing",
            remedy=f"use tp=1 with dp={mesh.world}",
            option="tp",
            value=mesh.tp,
        )
    mesh.check_world(group.size)


def ready_message(engine: StepEngine) -> Ready:
    """The message with which a rank tells the frontend that `build_engine` has returned."""
    transport = engine.transport
    return Ready(
        device_name=transport.streams.owner.describe(),
        transport_name=transport.name,
        data_path=transport.data_path,
        cache=engine.cache,
        attention=engine.attention,
        captured=engine.captured,
    )


def make_transport(config: ResolvedConfig, group: RankGroup, streams: Streams) -> Transport:
    """Make the transport of this rank. All ranks must call it together.

    If it fails in the driver or in a library because of the machine, this raises the `OptionError`, with reason and
    remedy, that `antiphon doctor` would have given. Other errors are those of `create_transport`.
    """
    options = config.options
    try:
        return create_transport(
            parse_transport(options.transport),
            expert_shape(config.model, config.dtype),
            group=group,
            streams=streams,
            num_lanes=options.policy.micro_batches,
            max_tokens=config.max_num_batched_tokens,
            peer_access=options.peer_access,
        )
    except AntiphonError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OptionError(
                f"the buffers of transport {config.transport.name!r} for steps of max_num_batched_tokens="
                f"{config.max_num_batched_tokens} tokens do not fit into the memory of this rank",
                limit=first_line(error),
                remedy="use a lower max_num_batched_tokens, which by default follows max_model_len",
                option="max_num_batched_tokens",
                value=config.max_num_batched_tokens,
            ) from error
        refusal = None if options.transport == "auto" else _refusal(config)  # `auto` has checked the machine already
        if refusal is None:
            raise
        raise refused(config.transport, refusal, first_line(error)) from error


def _refusal(config: ResolvedConfig) -> Refusal | None:
    """Why the transport cannot run on this machine; `None` if it can. Examining the machine takes seconds."""
    options = config.options
    world = World(
        ranks=options.mesh.ep,
        device_kind=config.device_kind,
        peer_access=options.peer_access,
        num_lanes=options.policy.micro_batches,
        max_tokens=config.max_num_batched_tokens,
    )
    shape = expert_shape(config.model, config.dtype)
    world = replace(world, host_bytes=slab_bytes(shape, world))  # of the buffers that were being made
    return load_transport(config.transport, config.device_kind).refusal(examine_machine(), shape, world)


def _attention_backend(config: ResolvedConfig, streams: Streams) -> tuple[AttentionBackend, str]:
    """The backend for this rank's attention, and the reason. Raises `OptionError` if the given one cannot be used."""
    name, shape = config.options.attention_backend, attention_shape(config.model)
    with nullcontext() if streams.owner.fused_kernels else no_cuda_kernels():
        return choose_backend(name, shape, config.dtype, config.options.block_size, streams.device)


def _load(
    config: ResolvedConfig, transport: Transport, backend: AttentionBackend, report: Callable[[Starting], None]
) -> CausalLM:
    """Load this rank's part of the model onto the transport's device."""
    options = config.options
    try:
        model = build_model(config.model, transport, config.routing, attention_backend=backend)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = format_bytes(weight_bytes(config.model, config.dtype, options.mesh.ep))
        raise OptionError(
            f"the weights of each of {options.ranks} ranks take {size} and do not fit into the memory of "
            f"{transport.streams.device}",
            limit=first_line(error),
            remedy="use more ranks or a lower num_layers",
            option="ranks",
            value=options.ranks,
        ) from error
    if config.matched is None:
        fill_dummy_weights(model, seed=options.seed)
    else:
        load_weights(
            config.matched.open(Path(options.model)),
            model.checkpoint_tensors(),
            progress=lambda p: report(Starting(what=LOADING, bytes_read=p.bytes, num_bytes=p.num_bytes)),
        )
    return model
