"""The decoder that all architectures share: embedding, layers of attention and experts, norm, head.

Architectures differ only in data (`DecoderConfig`): the kind of attention, the kind of router, and sizes.

Shapes: `T` tokens, `D` hidden size, `P` pairs of rotary dimensions, `N` rows whose logits are wanted, `V` vocabulary.
Parameters are named as in Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from antiphon.comm import Transport
from antiphon.core.batch import MicroBatch
from antiphon.kernels import expert_choice
from antiphon.kernels.attention import AttentionBackend
from antiphon.kernels.dispatch import takes_cuda_kernels
from antiphon.kernels.expert_tuning import reserve_experts, tune_experts
from antiphon.kernels.grouped_experts import ExpertWorkspace
from antiphon.models.attention.gqa import GroupedQueryAttention, GroupedQueryConfig
from antiphon.models.attention.mla import LatentAttention, LatentAttentionConfig
from antiphon.models.attention.rope import rope_angles, rope_tables
from antiphon.models.causal_lm import LayerState
from antiphon.models.config import USE_ANOTHER_MODEL, ConfigFile, ModelConfig
from antiphon.models.layers import Embedding, GatedFeedForward, Linear, RMSNorm, checkpoint_tensors
from antiphon.models.moe import Experts, MoELayer, MoENames
from antiphon.models.router import Router, RoutingConfig, check_groups

EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"

DEFAULT_EPS = 1e-6
"""The epsilon of norms in most architectures."""

_MOST_LAYERS = 10_000  # 100 times more than any model has; building a layer takes time, even on the meta device


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Everything in a `config.json` that the forward pass depends on."""

    attention: LatentAttentionConfig | GroupedQueryConfig
    routing: RoutingConfig
    num_dense_layers: int  # leading layers without experts
    dense_width: int
    expert_width: int
    num_shared_experts: int
    norm_eps: float
    tied_embeddings: bool
    moe_names: MoENames
    # set by `match_checkpoint`
    embedding_name: str = EMBEDDING_NAME  # a checkpoint may hold a tied one under the name of the head

    @staticmethod
    def read(
        file: ConfigFile,
        *,
        attention: LatentAttentionConfig | GroupedQueryConfig,
        routing: RoutingConfig,
        num_dense_layers: int,
        num_shared_experts: int,
        expert_width_key: str = "moe_intermediate_size",
        default_eps: float = DEFAULT_EPS,
        moe_names: MoENames | None = None,
    ) -> DecoderConfig:
        """Read the keys that all architectures share. Raises `ModelError` for those that are missing or wrong.

        default_eps: epsilon of the norms if the file has none.
        """
        check_groups(file, routing)
        file.require("hidden_act", ("silu",), "silu")
        _require_full_attention(file)
        return DecoderConfig(
            architecture=file.architecture,
            num_layers=file.count("num_hidden_layers", maximum=_MOST_LAYERS),
            hidden_size=attention.hidden_size,
            vocab_size=file.count("vocab_size"),
            # In some checkpoints with yarn, the file still has the length used in training.
            max_positions=max(file.positions(), attention.rope.stretched_positions),
            num_experts=routing.num_experts,
            top_k=routing.top_k,
            kv_width=attention.kv_width,
            eos_token_ids=file.eos_token_ids(),
            sampling_defaults=file.sampling_defaults(),
            attention=attention,
            routing=routing,
            num_dense_layers=num_dense_layers,
            dense_width=file.count("intermediate_size"),
            expert_width=file.count(expert_width_key),
            num_shared_experts=num_shared_experts,
            norm_eps=file.number("rms_norm_eps", default_eps),
            tied_embeddings=file.flag("tie_word_embeddings", False),
            moe_names=moe_names or MoENames(),
        )


def _require_full_attention(file: ConfigFile) -> None:
    kinds = file.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        limit = "only null, or 'full_attention' for all layers, is supported"
        raise file.fault("layer_types", kinds, limit=limit, remedy=USE_ANOTHER_MODEL)


class DecoderLayer(nn.Module):
    """Attention, then experts or a dense feed-forward."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        transport: Transport,
        workspace: ExpertWorkspace,
        backend: AttentionBackend,
    ) -> None:
        super().__init__()
        dtype = transport.shape.dtype
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.self_attn: LatentAttention | GroupedQueryAttention
        if isinstance(config.attention, LatentAttentionConfig):
            self.self_attn = LatentAttention(config.attention, layer, backend, dtype=dtype)
        else:
            self.self_attn = GroupedQueryAttention(config.attention, layer, backend, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp: MoELayer | GatedFeedForward
        if layer < config.num_dense_layers:
            self.mlp = GatedFeedForward(config.hidden_size, config.dense_width, dtype=dtype)
        else:
            self.mlp = _moe_layer(config, layer, transport, workspace)

    def forward(
        self,
        x_TD: torch.Tensor,
        more_TD: torch.Tensor | None,
        residual_TD: torch.Tensor | None,
        cos_TP: torch.Tensor,
        sin_TP: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The output of the feed-forward in one or two parts, and the residual that they have yet to be added to.

        The next norm adds them in one pass. x_TD, more_TD, residual_TD: the results of the previous layer, or the
        embedding and twice None.
        """
        if residual_TD is None:
            normed_TD, residual_TD = self.input_layernorm.forward(x_TD), x_TD
        else:
            normed_TD, residual_TD = self.input_layernorm.of_sum(x_TD, residual_TD, more_TD)
        attended_TD = self.self_attn.forward(normed_TD, cos_TP, sin_TP)
        normed_TD, residual_TD = self.post_attention_layernorm.of_sum(attended_TD, residual_TD)
        if isinstance(self.mlp, MoELayer):
            return *self.mlp.forward(normed_TD), residual_TD
        return self.mlp.forward(normed_TD), None, residual_TD


def _moe_layer(config: DecoderConfig, layer: int, transport: Transport, workspace: ExpertWorkspace) -> MoELayer:
    dtype = transport.shape.dtype
    shared_width = config.num_shared_experts * config.expert_width
    return MoELayer(
        Router(config.hidden_size, config.routing, dtype=dtype),
        Experts(transport, config.expert_width, workspace, label=f"layer {layer}", names=config.moe_names),
        GatedFeedForward(config.hidden_size, shared_width, dtype=dtype) if shared_width else None,
        names=config.moe_names,
    )


class Decoder(nn.Module):
    """The whole model on one rank, as a `CausalLM`. backend: computes the attention of all layers."""

    def __init__(self, config: DecoderConfig, transport: Transport, backend: AttentionBackend) -> None:
        super().__init__()
        dtype = transport.shape.dtype
        self.config = config
        self.backend = backend
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        workspace = self.workspace = ExpertWorkspace()  # one for all layers and lanes: they queue on one stream
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, transport, workspace, backend) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.lm_head = None if config.tied_embeddings else Linear(config.hidden_size, config.vocab_size, dtype=dtype)
        self._angles_P: torch.Tensor | None = None

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def capture_obstacle(self) -> str:
        return self.backend.capture_obstacle or expert_choice.capture_obstacle(self.embed_tokens.weight)

    def prepare_experts(self, num_rows: int, agree: Callable[[int], Sequence[int]]) -> str:
        experts = next((layer.mlp.experts for layer in self.decoder_layers() if isinstance(layer.mlp, MoELayer)), None)
        if experts is None or not takes_cuda_kernels(self.embed_tokens.weight):
            return ""
        weights, top_k = (experts.gate_up_EGD, experts.down_EDF), self.config.top_k
        tune_experts(self.workspace, *weights, num_experts=self.config.num_experts, top_k=top_k)
        self.workspace.choice.agree(agree(self.workspace.choice.small_rows))
        reserve_experts(self.workspace, num_rows, *weights, top_k=top_k)
        return self.workspace.choice.describe()

    def decode_bytes(self, num_requests: int, width: int) -> int:
        return self.backend.step_bytes(num_requests, width)

    def freeze(self) -> None:
        self.workspace.freeze()

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        return self.finish(self.run_layers(self.begin(token_ids_T, positions_T), range(self.num_layers)))

    def prepare(self, part: MicroBatch) -> MicroBatch:
        decodes = part.attention.decodes
        if decodes is None or part.attention.prepared is not None:
            return part
        prepared = self.backend.prepare(decodes.block_table_NB, decodes.seq_lens_N)
        return part if prepared is None else replace(part, attention=replace(part.attention, prepared=prepared))

    def begin(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> LayerState:
        x_TD = self.embed_tokens.forward(token_ids_T)
        if self._angles_P is None:
            self._angles_P = rope_angles(self.config.attention.rope).to(x_TD.device)
        cos_TP, sin_TP = rope_tables(self._angles_P, positions_T, self.config.attention.rope, x_TD.dtype)
        return x_TD, None, cos_TP, sin_TP

    def run_layers(self, state: LayerState, layers: range) -> LayerState:
        x_TD, residual_TD, cos_TP, sin_TP = state
        more_TD = None
        for layer in self.decoder_layers(layers):
            x_TD, more_TD, residual_TD = layer.forward(x_TD, more_TD, residual_TD, cos_TP, sin_TP)
        return x_TD if more_TD is None else x_TD + more_TD, residual_TD, cos_TP, sin_TP

    def finish(self, state: LayerState) -> torch.Tensor:
        x_TD, residual_TD, _, _ = state
        return self.norm.forward(x_TD) if residual_TD is None else self.norm.of_sum(x_TD, residual_TD)[0]

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        logits_NV = self._logits(hidden_ND)
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))

    def best_tokens(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self._logits(hidden_ND).argmax(-1)  # a wider dtype has the same order

    def _logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits in the model's dtype."""
        return F.linear(hidden_ND, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def bind_kv_cache(self, cache_by_layer: torch.Tensor) -> None:
        for layer, cache_blocks in zip(self.decoder_layers(), cache_by_layer, strict=True):
            layer.self_attn.cache_blocks = cache_blocks

    def checkpoint_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield self.config.embedding_name, self.embed_tokens.weight
        yield from checkpoint_tensors(self.layers, "model.layers.")
        yield from checkpoint_tensors(self.norm, "model.norm.")
        if self.lm_head is not None:
            yield HEAD_NAME, self.lm_head.weight

    def decoder_layers(self, layers: range | None = None) -> Iterator[DecoderLayer]:
        """All layers, or those of a range, with their type."""
        for number in range(self.num_layers) if layers is None else layers:
            layer = self.layers[number]
            assert isinstance(layer, DecoderLayer)
            yield layer
