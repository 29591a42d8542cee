"""The model's configuration and initial weights, and a forward pass that is fast to train.

The model is an ordinary transformers `DeepseekV3ForCausalLM`. Training does not call its forward, a Python loop
over experts, but `TrainingForward`, which reads the same parameters and computes the same function without caches,
written so that torch.compile makes few kernels of it. All experts run on all tokens as one wide matrix product, with
the routing weight (0 for an expert not chosen) multiplied in between: eight times the arithmetic, but no gather and
no scatter, and at this size the faster choice. `evaluate.py` checks the two against each other.

Shapes:

    B, S, T   rows of a batch, positions of a row, tokens (T = B * S)
    H         hidden size
    N, D      attention heads, size of a query or key head (a part without and a part with rotary embedding)
    E, K, G   routed experts of a layer, experts chosen for a token, groups of experts
    M         width of one expert
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokenizer import BOS, EOS, PAD, VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

Weights = dict[str, Tensor]

ROPE_THETA = 10000.0
RMS_EPS = 1e-6


def make_config() -> DeepseekV3Config:
    """The architecture of tiny-deepseek."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.0,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        num_mtp_layers=0,
        attention_bias=False,
        initializer_range=0.02,
        rms_norm_eps=RMS_EPS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def make_model(device: str) -> DeepseekV3ForCausalLM:
    """A float32 model with initial weights from torch's global generator.

    Matrices are drawn at 1 / sqrt(fan in), those that write to the residual stream smaller, routers at 0.02.
    """
    from transformers import DeepseekV3ForCausalLM

    hf = DeepseekV3ForCausalLM(make_config()).to(device).float()
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.dim() >= 2 and "embed_tokens" not in name:
                residual = "o_proj" in name or "down_proj" in name
                p.normal_(0, p.shape[-1] ** -0.5 * (0.3 if residual else 1.0))
            if name.endswith("mlp.gate.weight"):
                p.normal_(0, 0.02)
    return hf


class Sizes(NamedTuple):
    """What the layers need to know besides their weights; a tuple, so that torch.compile takes it as constants."""

    num_heads: int
    nope_dim: int  # part of a query or key head without rotary embedding
    rope_dim: int  # part with rotary embedding
    value_dim: int
    kv_rank: int
    num_experts: int
    num_chosen: int
    num_groups: int
    num_chosen_groups: int
    expert_width: int
    routed_scale: float
    dtype: torch.dtype  # of the matrix products; norms, router and residual stream are float32


def rms(x: Tensor, weight: Tensor, eps: float = RMS_EPS) -> Tensor:
    """RMSNorm over the last axis."""
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)) * weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in the precision of x."""
    return F.linear(x, weight.to(x.dtype))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding, as transformers' apply_rotary_pos_emb_interleave: [B, S, N, rope_dim]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(x: Tensor, cos: Tensor, sin: Tensor, p: Weights, c: Sizes) -> Tensor:
    """x plus causal multi-head latent attention of it: float32 [B, S, H]; cos and sin are [S, rope_dim / 2]."""
    B, S, _ = x.shape
    N, D = c.num_heads, c.nope_dim + c.rope_dim
    h = rms(x, p["ln1"]).to(c.dtype)
    q = linear(rms(linear(h, p["q_a"]).float(), p["q_ln"]).to(c.dtype), p["q_b"]).view(B, S, N, D)
    q_nope, q_rope = q.split([c.nope_dim, c.rope_dim], -1)
    kv, k_rope = linear(h, p["kv_a"]).split([c.kv_rank, c.rope_dim], -1)
    kv = linear(rms(kv.float(), p["kv_ln"]).to(c.dtype), p["kv_b"]).view(B, S, N, c.nope_dim + c.value_dim)
    k_nope, v = kv.split([c.nope_dim, c.value_dim], -1)
    cos, sin = cos[None, :, None].to(c.dtype), sin[None, :, None].to(c.dtype)
    q = torch.cat((q_nope, rope(q_rope, cos, sin)), -1)
    k = torch.cat((k_nope, rope(k_rope[:, :, None], cos, sin).expand(B, S, N, c.rope_dim)), -1)
    v = F.pad(v, (0, D - c.value_dim))  # one head size for all, so that flash attention takes it
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=D**-0.5
    )
    return x + linear(o.transpose(1, 2)[..., : c.value_dim].reshape(B, S, -1), p["o"]).float()


def mlp(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of a dense layer or of the shared expert."""
    return linear(F.silu(linear(h, gate)) * linear(h, up), down)


def descending_rank(x: Tensor) -> Tensor:
    """Place of each element in the descending order of its last axis, the largest 0; of equals, the first is first."""
    i = torch.arange(x.shape[-1], device=x.device)
    is_before = i[None, :] < i[:, None]
    own, other = x[..., :, None], x[..., None, :]
    return ((other > own) | ((other == own) & is_before)).sum(-1)


def route(h: Tensor, weight: Tensor, bias: Tensor, c: Sizes) -> tuple[Tensor, Tensor]:
    """Group-limited top-k of the biased sigmoid scores, by ranks instead of topk.

    h is [T, H]. Returns dense float32 weights [T, E], 0 where an expert is not chosen, and the load [E]: how many
    tokens chose each expert.
    """
    E, G = c.num_experts, c.num_groups
    scores = F.linear(h.float(), weight.float()).sigmoid()
    with torch.no_grad():
        biased = (scores + bias).view(-1, G, E // G)
        group = torch.where(descending_rank(biased) < 2, biased, 0.0).sum(-1)  # sum of the best two experts [T, G]
        out_of_reach = descending_rank(group) >= c.num_chosen_groups
        biased = biased.masked_fill(out_of_reach[..., None], float("-inf"))
        chosen = (descending_rank(biased.view(-1, E)) < c.num_chosen).float()
    w = scores * chosen
    return w / (w.sum(-1, keepdim=True) + 1e-20) * c.routed_scale, chosen.sum(0)


def block_dense(x: Tensor, cos: Tensor, sin: Tensor, p: Weights, c: Sizes) -> Tensor:
    """A layer without experts: float32 [B, S, H]."""
    x = attention(x, cos, sin, p, c)
    h = rms(x, p["ln2"]).to(c.dtype)
    return x + mlp(h, p["gate"], p["up"], p["down"]).float()


def block_moe(x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, p: Weights, c: Sizes) -> tuple[Tensor, Tensor]:
    """A layer of experts: float32 [B, S, H], and the load [E]. Weights: gate_up [E, 2M, H], expert_down [E, H, M]."""
    x = attention(x, cos, sin, p, c)
    h = rms(x, p["ln2"]).to(c.dtype).view(-1, x.shape[-1])
    w, load = route(h, p["router"], bias, c)
    E, M, H = c.num_experts, c.expert_width, h.shape[-1]
    gate, up = p["gate_up"].view(E, 2, M, H).unbind(1)
    a = F.silu(linear(h, gate.reshape(E * M, H))) * linear(h, up.reshape(E * M, H))  # [T, E * M]
    a = (a.view(-1, E, M) * w[:, :, None].to(a.dtype)).view(-1, E * M)
    y = linear(a, p["expert_down"].permute(1, 0, 2).reshape(H, E * M)) + mlp(h, p["gate"], p["up"], p["down"])
    return x + y.view_as(x).float(), load


def head_loss(x: Tensor, norm: Tensor, embedding: Tensor, labels: Tensor | None, c: Sizes) -> Tensor:
    """Mean cross entropy in nats, or without labels the float32 logits [B, S, VOCAB_SIZE]."""
    logits = linear(rms(x, norm).to(c.dtype), embedding)
    if labels is None:
        return logits.float()
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.reshape(-1))


def layer_weights(layer: torch.nn.Module) -> Weights:
    """The parameters of one decoder layer under the short names used here; "router" is there only with experts."""
    attn, ffn = layer.self_attn, layer.mlp
    p = {
        "ln1": layer.input_layernorm.weight,
        "ln2": layer.post_attention_layernorm.weight,
        "q_a": attn.q_a_proj.weight,
        "q_ln": attn.q_a_layernorm.weight,
        "q_b": attn.q_b_proj.weight,
        "kv_a": attn.kv_a_proj_with_mqa.weight,
        "kv_ln": attn.kv_a_layernorm.weight,
        "kv_b": attn.kv_b_proj.weight,
        "o": attn.o_proj.weight,
    }
    has_experts = hasattr(ffn, "experts")
    shared = ffn.shared_experts if has_experts else ffn
    p.update(gate=shared.gate_proj.weight, up=shared.up_proj.weight, down=shared.down_proj.weight)
    if has_experts:
        p.update(router=ffn.gate.weight, gate_up=ffn.experts.gate_up_proj, expert_down=ffn.experts.down_proj)
    return p


class TrainingForward:
    """The training forward over the parameters of a DeepseekV3ForCausalLM, which stays their owner.

    loss, loads = TrainingForward(hf, torch.float32)(ids, labels)    # ids, labels: int64 [B, S]

    `biases` are the routers' correction biases [E], one for each layer of experts, in the order of the loads.
    """

    def __init__(self, hf: DeepseekV3ForCausalLM, dtype: torch.dtype, compile: bool = False):
        cfg, model = hf.config, hf.model
        self.sizes = Sizes(
            num_heads=cfg.num_attention_heads,
            nope_dim=cfg.qk_nope_head_dim,
            rope_dim=cfg.qk_rope_head_dim,
            value_dim=cfg.v_head_dim,
            kv_rank=cfg.kv_lora_rank,
            num_experts=cfg.n_routed_experts,
            num_chosen=cfg.num_experts_per_tok,
            num_groups=cfg.n_group,
            num_chosen_groups=cfg.topk_group,
            expert_width=cfg.moe_intermediate_size,
            routed_scale=cfg.routed_scaling_factor,
            dtype=dtype,
        )
        self.embedding, self.norm = model.embed_tokens.weight, model.norm.weight
        self.layers = [layer_weights(layer) for layer in model.layers]
        self.biases = [m.mlp.gate.e_score_correction_bias for m in model.layers if hasattr(m.mlp, "experts")]

        frequencies = 1.0 / (ROPE_THETA ** (torch.arange(0, cfg.qk_rope_head_dim, 2).float() / cfg.qk_rope_head_dim))
        angles = torch.arange(cfg.max_position_embeddings).float()[:, None] * frequencies[None]
        self.cos, self.sin = angles.cos().to(self.embedding.device), angles.sin().to(self.embedding.device)

        self.block_dense, self.block_moe, self.head_loss = block_dense, block_moe, head_loss
        if compile:
            self.block_dense, self.block_moe, self.head_loss = (
                torch.compile(f, dynamic=False, fullgraph=True) for f in (block_dense, block_moe, head_loss)
            )

    def __call__(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loss (or logits, without labels), and for each layer of experts the load [E]."""
        x, loads, S = F.embedding(ids, self.embedding), [], ids.shape[1]
        cos, sin = self.cos[:S], self.sin[:S]
        for p in self.layers:
            if "router" in p:
                x, load = self.block_moe(x, cos, sin, self.biases[len(loads)], p, self.sizes)
                loads.append(load)
            else:
                x = self.block_dense(x, cos, sin, p, self.sizes)
        return self.head_loss(x, self.norm, self.embedding, labels, self.sizes), loads
