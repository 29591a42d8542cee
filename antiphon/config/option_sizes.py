"""Options of an engine that count tokens, requests or bytes, and so may be written as sizes: `"32k"`, `"20GiB"`."""

from __future__ import annotations

from typing import Any

from antiphon.core.sizes import parse_size

COUNT_OPTIONS = frozenset(
    {
        *("dbo_prefill_token_threshold", "dbo_decode_token_threshold"),
        *("min_total_tokens_to_split", "min_prefill_tokens_to_split"),
        *("max_num_batched_tokens", "max_num_seqs", "max_model_len", "block_size"),
    }
)
BYTES_OPTIONS = frozenset({"kv_cache_memory"})


def as_number(name: str, value: Any, *, shown: str = "") -> Any:
    """What is meant by the value of option `name`; other values and other options as they are.

    shown: how the user has written it, for an error. Raises `OptionError` for a text that is no size.
    """
    shown = shown or f"{name}={value!r}"
    if name == "max_model_len" and value == -1:
        value = "auto"  # in vLLM they are the same
    if name not in COUNT_OPTIONS | BYTES_OPTIONS or not isinstance(value, str):
        return value
    return parse_size(value, shown=shown, of_bytes=name in BYTES_OPTIONS)
