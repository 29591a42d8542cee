"""The options of an engine: what the user says, and what becomes of `auto`.

Here and not in `core`, because settling `auto` needs the model's configuration and the transports.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from antiphon.comm import TransportSpec, choose_transport, load_transport, parse_transport
from antiphon.core.bundled import BUNDLED_MODEL, bundled_model
from antiphon.core.checks import is_number, is_whole
from antiphon.core.errors import OptionError, unknown_value
from antiphon.core.policy import OverlapPolicy
from antiphon.engine.kv_cache import block_bytes
from antiphon.models import Checkpoint, ModelConfig, check_checkpoint, expert_shape, read_config, skeleton

__all__ = ["DTYPES", "EngineConfig", "ResolvedConfig", "settle_policy"]

logger = logging.getLogger("antiphon.engine")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

_LONGEST_TIMEOUT_S = 86_400
_MIN_KV_CACHE_BYTES = 256 * 2**20
_MIN_BATCHED_TOKENS = 2048


ONE_RANK_HIDES_NOTHING = "one rank has no communication to hide"


def settle_policy(policy: OverlapPolicy, ranks: int) -> OverlapPolicy:
    """`auto` is `off` on one rank, where there is nothing to hide."""
    return replace(policy, dbo="off") if policy.dbo == "auto" and ranks == 1 else policy


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
        if not is_number(self.timeout_s) or not 0 < self.timeout_s <= _LONGEST_TIMEOUT_S:
            raise OptionError(
                f"timeout_s={self.timeout_s!r} is not a time to wait; use a number of seconds above 0, "
                f"at most {_LONGEST_TIMEOUT_S}"
            )
        if not is_whole(self.seed) or not 0 <= self.seed < 2**62:
            raise OptionError(f"seed={self.seed!r} is not an integer from 0 to 2**62 - 1; pass one")
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
            options=replace(self, model=str(folder), policy=settle_policy(self.policy, self.ranks)),
            requested_dbo=self.policy.dbo,
            model=model,
            dtype_name=dtype_name,
            transport=transport,
            transport_reason=transport_reason,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_batched,
            num_blocks=num_blocks,
        )
        for name, value, reason in resolved.settled():
            logger.info("%s: auto -> %s (%s)", name, value, reason)
        return resolved

    def _num_blocks(self, model: ModelConfig, max_model_len: int, dtype: torch.dtype) -> int:
        """One block more than can be used: the cache keeps block 0 for padding."""
        if self.kv_cache_memory is not None:
            _check_count("kv_cache_memory", self.kv_cache_memory)
            memory = self.kv_cache_memory
        else:
            one_text = -(-max_model_len // self.block_size) + 1
            memory = max(_MIN_KV_CACHE_BYTES, one_text * block_bytes(model, block_size=self.block_size, dtype=dtype))
        num_blocks = memory // block_bytes(model, block_size=self.block_size, dtype=dtype)
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
    requested_dbo: str
    model: ModelConfig
    dtype_name: str
    transport: TransportSpec
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
            settled.append(("transport", str(self.transport), self.transport_reason))
        if self.requested_dbo != self.options.policy.dbo:
            settled.append(("dbo", self.options.policy.dbo, ONE_RANK_HIDES_NOTHING))
        if self.options.dtype == "auto":
            settled.append(("dtype", self.dtype_name, "exact and fast on CPUs"))
        return settled

    def _settled_dbo(self) -> str:
        return f"{self.requested_dbo}: {self.options.policy.dbo}, {ONE_RANK_HIDES_NOTHING}"

    def describe(self) -> list[tuple[str, str]]:
        """(heading, text) of the start-up block."""
        options, model = self.options, self.model
        memory_mb = self.num_blocks * block_bytes(model, block_size=options.block_size, dtype=self.dtype) / 2**20
        return [
            ("model", f"{options.model} ({model.architecture}, {self.dtype_name})"),
            (
                "ranks",
                f"{options.ranks} on the CPU, {model.num_experts // options.ranks} of {model.num_experts} experts each",
            ),
            ("transport", f"{self.transport}: {self.transport_reason}"),
            (
                "KV cache",
                f"{self.kv_capacity_tokens:,} tokens a rank ({memory_mb:,.0f} MiB), "
                f"texts up to {self.max_model_len:,} tokens",
            ),
            ("dbo", options.policy.describe() if self.requested_dbo == options.policy.dbo else self._settled_dbo()),
        ]


def _check_count(name: str, value: object) -> None:
    if not is_whole(value) or value < 1:
        raise OptionError(f"{name}={value!r} is not a count; use an integer of at least 1")


def _limit(name: str, value: int | None, most: int, what: str) -> int:
    if value is None:
        return most
    _check_count(name, value)
    if value > most:
        raise OptionError(f"{name}={value} is more than {what}, {most}; use at most {most}")
    return value
