"""DeepSeek-V3: latent attention, sigmoid routing with groups, shared experts, leading dense layers.

Shapes: `T` tokens, `D` hidden size, `P` pairs of rotary dimensions, `N` rows whose logits are wanted, `V` vocabulary.
Source: DeepSeek-V3 Technical Report; names of parameters as in its Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from antiphon.comm import Transport
from antiphon.core.errors import ModelError
from antiphon.models.config import ConfigFile, ModelConfig
from antiphon.models.layers import Embedding, GatedFeedForward, Linear, RMSNorm
from antiphon.models.mla import LatentAttention, LatentAttentionConfig
from antiphon.models.moe import Experts, MoELayer, RoutingConfig, SigmoidRouter
from antiphon.models.rope import RopeConfig, rope_angles, rope_tables

__all__ = ["DeepseekV3Config", "DeepseekV3Model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV3Config(ModelConfig):
    """All of a DeepSeek-V3 `config.json` that the forward pass depends on."""

    attention: LatentAttentionConfig
    routing: RoutingConfig
    num_dense_layers: int  # leading layers without experts
    dense_width: int
    expert_width: int
    num_shared_experts: int
    norm_eps: float
    tied_embeddings: bool

    @staticmethod
    def read(file: ConfigFile) -> DeepseekV3Config:
        """Raises `ModelError` for keys that are missing, wrong, or ask for what is not supported."""
        if file.get("quantization_config") is not None:
            settings = file.get("quantization_config")
            method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
            raise ModelError(
                f"{file.path} is quantised ({method!r}), which is not supported; use a bfloat16 checkpoint"
            )
        file.require("hidden_act", ("silu",), "silu")
        file.require("scoring_func", ("sigmoid",), "sigmoid")
        file.require("topk_method", ("noaux_tc",), "noaux_tc")
        file.require("moe_layer_freq", (1,), 1)
        rope_size = file.count("qk_rope_head_dim")
        if rope_size % 2:
            raise ModelError(f"{file.path} has qk_rope_head_dim={rope_size}; pairs need an even number")
        attention = LatentAttentionConfig(
            hidden_size=file.count("hidden_size"),
            num_heads=file.count("num_attention_heads"),
            query_rank=None if file.get("q_lora_rank") is None else file.count("q_lora_rank"),
            latent_size=file.count("kv_lora_rank"),
            query_size=file.count("qk_nope_head_dim"),
            value_size=file.count("v_head_dim"),
            bias=file.flag("attention_bias", False),
            rope=RopeConfig.read(file, size=rope_size, interleaved=file.flag("rope_interleave", True)),
        )
        routing = RoutingConfig(
            num_experts=file.count("n_routed_experts"),
            top_k=file.count("num_experts_per_tok"),
            num_groups=file.count("n_group"),
            top_groups=file.count("topk_group"),
            normalize=file.flag("norm_topk_prob", True),
            scale=file.number("routed_scaling_factor", 1.0),
        )
        _check_groups(file, routing)
        return DeepseekV3Config(
            architecture=file.architecture,
            num_layers=file.count("num_hidden_layers"),
            hidden_size=attention.hidden_size,
            vocab_size=file.count("vocab_size"),
            max_positions=file.count("max_position_embeddings"),
            num_experts=routing.num_experts,
            top_k=routing.top_k,
            kv_width=attention.latent_size + rope_size,
            eos_token_ids=file.eos_token_ids(),
            attention=attention,
            routing=routing,
            num_dense_layers=file.count("first_k_dense_replace", minimum=0),
            dense_width=file.count("intermediate_size"),
            expert_width=file.count("moe_intermediate_size"),
            num_shared_experts=0 if file.get("n_shared_experts") is None else file.count("n_shared_experts", minimum=0),
            norm_eps=file.number("rms_norm_eps", 1e-6),
            tied_embeddings=file.flag("tie_word_embeddings", False),
        )


def _check_groups(file: ConfigFile, routing: RoutingConfig) -> None:
    per_group, rest = divmod(routing.num_experts, routing.num_groups)
    if rest or routing.top_groups > routing.num_groups:
        raise ModelError(
            f"{file.path} has n_routed_experts={routing.num_experts}, n_group={routing.num_groups}, "
            f"topk_group={routing.top_groups}; groups must divide the experts and contain the chosen ones"
        )
    if routing.top_k > per_group * routing.top_groups or (per_group < 2 and routing.top_groups < routing.num_groups):
        raise ModelError(
            f"{file.path} has num_experts_per_tok={routing.top_k}, but chooses "
            f"from {routing.top_groups} groups of {per_group} experts"
        )


class DeepseekV3Layer(nn.Module):
    """Attention, then experts or a dense feed-forward."""

    def __init__(self, config: DeepseekV3Config, layer: int, transport: Transport) -> None:
        super().__init__()
        dtype = transport.shape.dtype
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.self_attn = LatentAttention(config.attention, layer, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp: MoELayer | GatedFeedForward
        if layer < config.num_dense_layers:
            self.mlp = GatedFeedForward(config.hidden_size, config.dense_width, dtype=dtype)
        else:
            self.mlp = _moe_layer(config, layer, transport)

    def forward(self, x_TD: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos_TP, sin_TP)
        x_TD = x_TD + self.mlp(self.post_attention_layernorm(x_TD))
        return x_TD


def _moe_layer(config: DeepseekV3Config, layer: int, transport: Transport) -> MoELayer:
    dtype = transport.shape.dtype
    shared_width = config.num_shared_experts * config.expert_width
    return MoELayer(
        SigmoidRouter(config.hidden_size, config.routing, dtype=dtype),
        Experts(transport, config.expert_width, label=f"layer {layer}"),
        GatedFeedForward(config.hidden_size, shared_width, dtype=dtype) if shared_width else None,
    )


class DeepseekV3Model(nn.Module):
    """The whole model on one rank; the calls are those of `CausalLM`."""

    def __init__(self, config: DeepseekV3Config, transport: Transport) -> None:
        super().__init__()
        dtype = transport.shape.dtype
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DeepseekV3Layer(config, layer, transport) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.lm_head = None if config.tied_embeddings else Linear(config.hidden_size, config.vocab_size, dtype=dtype)
        self._angles_P: torch.Tensor | None = None

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        x_TD: torch.Tensor = self.embed_tokens(token_ids_T)
        if self._angles_P is None:
            self._angles_P = rope_angles(self.config.attention.rope).to(x_TD.device)
        cos_TP, sin_TP = rope_tables(self._angles_P, positions_T, self.config.attention.rope, x_TD.dtype)
        for layer in self.layers:
            x_TD = layer(x_TD, cos_TP, sin_TP)
        x_TD = self.norm(x_TD)
        return x_TD

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits_NV = F.linear(hidden_ND, head)
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))

    def bind_kv_cache(self, cache_by_layer: torch.Tensor) -> None:
        for layer, cache_blocks in zip(self.layers, cache_by_layer, strict=True):
            assert isinstance(layer, DeepseekV3Layer)
            layer.self_attn.cache_blocks = cache_blocks

    def checkpoint_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if ".experts." not in name:
                yield name if name.startswith("lm_head.") else f"model.{name}", tensor
        for number, layer in enumerate(self.layers):
            if isinstance(layer.mlp, MoELayer):
                yield from layer.mlp.experts.checkpoint_tensors(f"model.layers.{number}.mlp.experts.")
