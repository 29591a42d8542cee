"""The options of an engine: what the user says, and what becomes of `auto`.

Here and not in `core`, because settling `auto` needs the model's configuration and the transports.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from antiphon.comm import choose_transport, load_transport, parse_transport
from antiphon.core.bundled import BUNDLED_MODEL, bundled_model
from antiphon.core.errors import OptionError, unknown_value
from antiphon.core.policy import OverlapPolicy
from antiphon.engine.kv_cache import num_blocks_for
from antiphon.models import Checkpoint, ModelConfig, check_checkpoint, expert_shape, read_config, skeleton

__all__ = ["DTYPES", "EngineConfig", "ResolvedConfig"]

logger = logging.getLogger("antiphon.engine")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

_MIN_KV_CACHE_BYTES = 256 * 2**20
_MIN_BATCHED_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user asked for; the fields are described in `antiphon.LLM`."""

    model: str = BUNDLED_MODEL
    ranks: int = 1
    transport: str = "auto"
    dtype: str = "auto"
    policy: OverlapPolicy = field(default_factory=OverlapPolicy)
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 256
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory: int | None = None
    seed: int = 0
    timeout_s: float = 120.0
    debug_order: bool = False

    def resolve(self) -> ResolvedConfig:
        """Check everything that can be checked before a process starts, and settle every `auto`.

        Raises `OptionError` for options, `ModelError` for the checkpoint.
        """
        for name in ("ranks", "max_num_seqs", "block_size"):
            _check_count(name, getattr(self, name))
        if not self.timeout_s > 0:
            raise OptionError(f"timeout_s={self.timeout_s} is not a time to wait; use a number of seconds above 0")
        if self.dtype not in ("auto", *DTYPES):
            raise unknown_value("dtype", self.dtype, ("auto", *DTYPES))
        requested = parse_transport(self.transport)

        folder = bundled_model() if self.model == BUNDLED_MODEL else Path(self.model).expanduser()
        model = read_config(folder)
        dtype_name = "float32" if self.dtype == "auto" else self.dtype
        shape = expert_shape(model, DTYPES[dtype_name])
        shape.experts_per_rank(self.ranks)
        transport, transport_reason = choose_transport(requested, shape, self.ranks)
        load_transport(transport)
        check_checkpoint(Checkpoint(folder), skeleton(model).checkpoint_tensors())

        max_model_len = _limit("max_model_len", self.max_model_len, model.max_positions, "the model's positions")
        max_batched = self.max_num_batched_tokens
        if max_batched is None:
            max_batched = max(_MIN_BATCHED_TOKENS, max_model_len)
        _check_count("max_num_batched_tokens", max_batched)
        num_blocks = self._num_blocks(model, max_model_len, DTYPES[dtype_name])
        resolved = ResolvedConfig(
            options=replace(self, model=str(folder)),
            model=model,
            dtype_name=dtype_name,
            transport=str(transport) if transport.link is None else self._simulated(transport.name),
            transport_name=str(transport),
            transport_reason=transport_reason,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_batched,
            num_blocks=num_blocks,
        )
        for name, value, reason in resolved.settled():
            logger.info("%s: auto -> %s (%s)", name, value, reason)
        return resolved

    def _simulated(self, inner: str) -> str:
        parts = self.transport.split(":")
        return ":".join(["simulated", inner, *parts[2:]])

    def _num_blocks(self, model: ModelConfig, max_model_len: int, dtype: torch.dtype) -> int:
        """One block more than can be used: the cache keeps block 0 for padding."""
        if self.kv_cache_memory is not None:
            _check_count("kv_cache_memory", self.kv_cache_memory)
            memory = self.kv_cache_memory
        else:
            one_text = -(-max_model_len // self.block_size) + 1
            block_bytes = model.num_layers * self.block_size * model.kv_width * dtype.itemsize
            memory = max(_MIN_KV_CACHE_BYTES, one_text * block_bytes)
        num_blocks = num_blocks_for(model, block_size=self.block_size, memory_bytes=memory, dtype=dtype)
        if num_blocks < 2:
            raise OptionError(
                f"kv_cache_memory={memory} bytes holds {num_blocks} blocks of {self.block_size} tokens; "
                "at least 2 are needed, so give more memory or a smaller block_size"
            )
        return num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """Options without `auto`, and the reasons. Workers get only the options and resolve them again."""

    options: EngineConfig
    model: ModelConfig
    dtype_name: str
    transport: str  # an option string again
    transport_name: str
    transport_reason: str
    max_model_len: int
    max_num_batched_tokens: int
    num_blocks: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the KV cache of one rank holds."""
        return (self.num_blocks - 1) * self.options.block_size

    def settled(self) -> list[tuple[str, str, str]]:
        """(option, value, reason) of every `auto`."""
        settled = []
        if "auto" in self.options.transport or self.options.transport == "simulated":
            settled.append(("transport", self.transport_name, self.transport_reason))
        if self.options.dtype == "auto":
            settled.append(("dtype", self.dtype_name, "exact and fast on CPUs"))
        return settled

    def describe(self) -> list[tuple[str, str]]:
        """(heading, text) of the start-up block."""
        options, model = self.options, self.model
        memory_mb = (
            self.num_blocks * model.num_layers * options.block_size * model.kv_width * self.dtype.itemsize / 2**20
        )
        return [
            ("model", f"{options.model} ({model.architecture}, {self.dtype_name})"),
            (
                "ranks",
                f"{options.ranks} on the CPU, {model.num_experts // options.ranks} of {model.num_experts} experts each",
            ),
            ("transport", f"{self.transport_name}: {self.transport_reason}"),
            (
                "KV cache",
                f"{self.kv_capacity_tokens:,} tokens a rank ({memory_mb:,.0f} MiB), "
                f"texts up to {self.max_model_len:,} tokens",
            ),
            ("dbo", options.policy.describe()),
        ]


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name}={value!r} is not a count; use an integer of at least 1")


def _limit(name: str, value: int | None, most: int, what: str) -> int:
    if value is None:
        return most
    _check_count(name, value)
    if value > most:
        raise OptionError(f"{name}={value} is more than {what}, {most}; use at most {most}")
    return value
