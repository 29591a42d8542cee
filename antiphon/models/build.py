"""Building a rank's part of a model from its configuration, and the size of any rank's part."""

from __future__ import annotations

from dataclasses import replace

import torch

from antiphon.comm import ExpertShape, RankGroup, Transport, create_transport
from antiphon.core.errors import ModelError, first_line
from antiphon.kernels.attention import AttentionBackend, AttentionShape, choose_backend
from antiphon.models.checkpoint.dummy_routing import RouteTable, RoutingKind, RoutingSpec, TableRouter, routing_tables
from antiphon.models.config import ModelConfig
from antiphon.models.decoder import Decoder, DecoderConfig
from antiphon.models.moe import Experts, MoELayer
from antiphon.models.router import Router
from antiphon.runtime import CpuStreams

DEFAULT_BLOCK_SIZE = 16
"""Tokens per block of the KV cache for which a model is built, unless its attention backend is given."""

_META = torch.device("meta")


def expert_shape(config: ModelConfig, dtype: torch.dtype) -> ExpertShape:
    """The shape of a model's experts, as its transport needs it."""
    return ExpertShape(num_experts=config.num_experts, top_k=config.top_k, hidden_size=config.hidden_size, dtype=dtype)


def attention_shape(config: ModelConfig) -> AttentionShape:
    """The shape of a model's attention, as its backend needs it."""
    return _decoder_config(config).attention.shape


def build_model(
    config: ModelConfig,
    transport: Transport,
    routing: RoutingSpec | None = None,
    *,
    attention_backend: AttentionBackend | None = None,
) -> Decoder:
    """This rank's part of the model with uninitialized weights, on the transport's device and in its dtype.

    routing: replaces the choice of every router, see `checkpoint.dummy_routing`. attention_backend: the one chosen
    automatically by default, for a KV cache in blocks of `DEFAULT_BLOCK_SIZE` tokens.
    """
    device = transport.streams.device
    if attention_backend is None:
        shape, dtype = attention_shape(config), transport.shape.dtype
        attention_backend, _ = choose_backend("auto", shape, dtype, DEFAULT_BLOCK_SIZE, device)
    with torch.device(device):
        model = Decoder(_decoder_config(config), transport, attention_backend)
    if routing is not None and routing.kind is not RoutingKind.MODEL:
        _route_by_table(model, routing, transport)
    return model


def _route_by_table(model: Decoder, routing: RoutingSpec, transport: Transport) -> None:
    moe_layers = {
        number: layer.mlp for number, layer in enumerate(model.decoder_layers()) if isinstance(layer.mlp, MoELayer)
    }
    tables = routing_tables(
        routing,
        num_experts=model.config.num_experts,
        top_k=model.config.top_k,
        layers=moe_layers,
        rank=transport.group.rank,
        num_ranks=transport.group.size,
    )
    on_device: dict[int, RouteTable] = {}  # a table that layers share is copied once, and looked up once per step
    for number, table_NK in tables.items():
        if id(table_NK) not in on_device:
            on_device[id(table_NK)] = RouteTable(table_NK.to(transport.streams.device))
        router = moe_layers[number].gate
        assert isinstance(router, Router)
        moe_layers[number].gate = TableRouter(router, on_device[id(table_NK)])


def skeleton(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """The whole model on the meta device, for the names and shapes that a checkpoint must have.

    Raises `ModelError` for sizes that no tensor can have on any device.
    """
    group = RankGroup(rank=0, size=1)
    try:
        with torch.device("meta"):
            transport = create_transport(
                "local", expert_shape(config, dtype), group=group, streams=CpuStreams(), num_lanes=1
            )
            backend, _ = choose_backend("torch", attention_shape(config), dtype, DEFAULT_BLOCK_SIZE, _META)
            return Decoder(_decoder_config(config), transport, backend)
    except RuntimeError as error:
        raise ModelError(
            f"the sizes in config.json describe tensors that cannot exist ({first_line(error)})",
            remedy=f"use the file that was published with the weights of this {config.architecture}",
        ) from error


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters of the whole model, correction biases of routers included."""
    return sum(tensor.numel() for _, tensor in skeleton(config).checkpoint_tensors())


def weight_bytes(config: ModelConfig, dtype: torch.dtype, num_ranks: int) -> int:
    """Bytes of weights on one rank: its share of the experts, and all other weights.

    MoE layers are all of one size, so building two of them is enough to know the size of any number.
    Raises as `skeleton` does.
    """
    num_first = min(config.num_layers, _decoder_config(config).num_dense_layers + 1)
    first = _weight_bytes(replace(config, num_layers=num_first), dtype, num_ranks)
    if num_first == config.num_layers:
        return first
    one_more = _weight_bytes(replace(config, num_layers=num_first + 1), dtype, num_ranks)
    return first + (one_more - first) * (config.num_layers - num_first)


def _weight_bytes(config: ModelConfig, dtype: torch.dtype, num_ranks: int) -> int:
    model = skeleton(config, dtype)
    everything = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    experts = sum(
        tensor.nbytes for module in model.modules() if isinstance(module, Experts) for tensor in module.parameters()
    )
    return everything - experts + experts // num_ranks


def _decoder_config(config: ModelConfig) -> DecoderConfig:
    assert isinstance(config, DecoderConfig), "configs come from read_config"
    return config
