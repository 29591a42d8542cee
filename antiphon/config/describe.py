"""The start-up block: a summary in words of what an engine will do."""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.config.cache import block_bytes
from antiphon.config.engine_config import ResolvedConfig
from antiphon.core.plan import plan_kind
from antiphon.core.policy import NEVER
from antiphon.machine.advice import format_bytes, format_count


def describe_config(config: ResolvedConfig) -> list[tuple[str, str]]:
    """The lines of the block, as pairs of heading and text."""
    mesh, num_experts = config.options.mesh, config.model.num_experts
    device = config.device_name or config.device_kind if config.device.own_memory else "the CPU"
    graphs = _graphs(config)
    return [
        ("model", f"{config.options.model} ({_model(config)})"),
        ("ranks", f"{mesh.world} on {device}, {num_experts // mesh.ep} of {num_experts} experts each"),
        ("transport", f"{config.transport}: {config.transport_reason}"),
        ("attention", config.attention or f"{config.options.attention_backend}: resolved when the ranks start"),
        ("KV cache", _cache(config)),
        ("steps", _steps(config)),
        *([("graphs", graphs)] if graphs else []),
        ("dbo", _dbo(config)),
    ]


def _model(config: ResolvedConfig) -> str:
    facts = [config.model.architecture, config.dtype_name]
    if config.options.num_layers is not None:
        facts.append(f"cut to {config.model.num_layers} layers")
    if config.options.load_format == "dummy":
        facts.append(f"dummy weights, routing {config.routing}")
    return ", ".join(facts)


def _cache(config: ResolvedConfig) -> str:
    texts = f"texts up to {config.max_model_len:,} tokens"
    if config.cache is None:
        return f"measured when the weights are loaded, {texts}"
    block = block_bytes(config.model, block_size=config.options.block_size, dtype=config.dtype)
    memory_mb = config.cache.num_blocks * block / 2**20
    prefixes = "on" if config.options.prefix_caching else "off"
    return (
        f"{config.kv_capacity_tokens:,} tokens per rank ({memory_mb:,.0f} MiB, {config.cache.source}), {texts}, "
        f"prefix caching {prefixes}"
    )


def _steps(config: ResolvedConfig) -> str:
    prompts = "prompts may take several"
    if not config.options.chunked_prefill:
        prompts = "prompts are cut only where they are longer than that"
    num_requests = config.options.max_num_seqs
    return f"up to {config.max_num_batched_tokens:,} tokens and {num_requests} requests per rank; {prompts}"


def _graphs(config: ResolvedConfig) -> str:
    """What was captured; "" on devices that cannot capture anything, unless an option asks for it."""
    captured, options = config.captured, config.options
    if options.enforce_eager:
        return "none: enforce_eager is set"
    if captured is None:
        return "captured when the weights are loaded" if config.device.capturable else ""
    if captured.sizes:
        lanes = min(captured.sizes)
        sizes = [lanes * rows for rows in captured.sizes[lanes]]
        has_all = sizes[-1] >= min(options.max_num_seqs, config.max_num_batched_tokens)
        larger = "" if has_all else "; steps of more sequences are eager"
        if not captured.num_graphs:
            return f"decode steps are padded to {_sequences(sizes)}{larger}; {captured.obstacle}"
        kinds = " and ".join(plan_kind(lanes) for lanes in captured.sizes)
        return (
            f"{format_count(captured.num_graphs, 'decode step')} of {_sequences(sizes)}, {kinds}, captured in "
            f"{captured.time_s:.1f} s ({format_bytes(captured.num_bytes)}){larger}"
        )
    return f"none: {captured.obstacle}" if config.device.capturable else ""


_MOST_LISTED = 8


def _sequences(sizes: Sequence[int]) -> str:
    if len(sizes) > _MOST_LISTED:
        return f"{sizes[0]} to {sizes[-1]} sequences"
    return f"{', '.join(map(str, sizes))} sequence{'s' if sizes[-1] > 1 else ''}"


def _dbo(config: ResolvedConfig) -> str:
    asked, resolved = config.options.policy.dbo, config.resolved_policy
    policy = resolved.policy
    if asked != policy.dbo:
        return f"{asked}: {policy.dbo}, {resolved.cause}"
    if config.data_path is None and asked == "auto":
        text = f"{asked}: {resolved.cause}"
    else:
        text = policy.describe() + (f": {resolved.cause}" if resolved.cause else "")
        most, prefill = config.max_num_batched_tokens, policy.threshold(decode_only=False)
        text += f"; a step has at most {most} tokens" if policy.dbo != "off" and most <= prefill < NEVER else ""
    return text + (f", by {config.dbo_source}" if config.dbo_source else "")
