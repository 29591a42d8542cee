"""The options of an engine, as requested and as resolved.

They are not in `core` because resolving `auto` needs the model's configuration and the transports.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from antiphon.comm import DataPath, Mesh, TransportSpec, choose_transport, load_transport, parse_transport
from antiphon.config.cache import CacheSize, block_bytes
from antiphon.config.graph_sizes import CaptureReport, default_ladder, ladder_up_to, parse_graph_sizes
from antiphon.config.options import DTYPE_NAMES, OPTION_DEFAULTS, EngineOptions
from antiphon.config.resolve import (
    check_layers,
    overruled_dbo,
    resolve_dbo,
    resolve_device,
    resolve_peer_access,
    resolve_routing,
    resolve_source,
)
from antiphon.core.errors import OptionError
from antiphon.core.options import check_options
from antiphon.core.policy import OverlapPolicy
from antiphon.device.device import Device
from antiphon.device.table import find_device
from antiphon.models import MatchedFiles, ModelConfig, RoutingSpec, expert_shape, match_checkpoint, read_config
from antiphon.planning import Conditions, ResolvedPolicy, resolve_policy

logger = logging.getLogger("antiphon.engine")

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}

_MIN_KV_CACHE_BYTES = 256 * 2**20
_MIN_BATCHED_TOKENS = 2048
_MOST_DEFAULT_BATCHED_TOKENS = 8192
"""Upper limit of the default on a GPU, where buffers are sized for the largest step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(EngineOptions):
    """The options as the user requested them; `policy` has the overlap options."""

    policy: OverlapPolicy = field(default_factory=OverlapPolicy)

    @property
    def mesh(self) -> Mesh:
        """The axes of the ranks: each rank serves its own requests, and the experts are spread over all ranks."""
        return Mesh(dp=self.ranks)

    def resolve(self, *, matched: MatchedFiles | None = None) -> ResolvedConfig:
        """Check everything that can be checked before a process starts, and resolve every `auto`.

        matched: the checkpoint files that another process has already matched, which are not matched again.
        Raises `OptionError` for options, `ModelError` for the checkpoint.
        """
        # 1 the options alone
        check_options(self)
        device_kind, device_reason = resolve_device(self.device, self.ranks)
        requested = parse_transport(self.transport)
        # 2 the model
        policy, dbo_source = resolve_dbo(self.policy)
        source = resolve_source(self.model, self.load_format, revision=self.revision)
        routing = resolve_routing(self.routing, self.load_format)
        model = read_config(source, num_layers=self.num_layers)
        check_layers(policy, model.num_layers)
        # 3 the transport
        device = find_device(device_kind)
        dtype_name = str(device.default_dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        shape = expert_shape(model, DTYPES[dtype_name])
        shape.experts_per_rank(self.mesh.ep)
        peer_access = resolve_peer_access(self.peer_access)
        transport, transport_reason = choose_transport(
            requested, shape, self.mesh.ep, device_kind=device_kind, peer_access=peer_access
        )
        load_transport(transport, device_kind)
        # 4 the checkpoint
        notes: tuple[str, ...] = ()
        if matched is None and self.load_format != "dummy":
            found = match_checkpoint(model, Path(source))
            matched, notes = found.files, found.notes
        if matched is not None:
            model = matched.resolve(model)
        # 5 sizes
        max_model_len = self._max_model_len(model.max_positions)
        max_num_batched_tokens = self._max_num_batched_tokens(max_model_len, device)
        resolved = ResolvedConfig(
            options=replace(
                self,
                model=str(source),
                revision=None,  # the folder has that revision
                peer_access=peer_access,
                policy=policy,
            ),
            dbo_source=dbo_source,
            model=model,
            matched=matched,
            checkpoint_notes=notes,
            routing=routing,
            device_kind=device_kind,
            device_reason=device_reason,
            dtype_name=dtype_name,
            transport=transport,
            transport_reason=transport_reason,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            cache=self._cache(model, max_model_len, DTYPES[dtype_name], device),
            data_path=DataPath.NONE if self.mesh.ep == 1 else None,
        )
        for name, value, reason in resolved.chosen():
            logger.info("%s: auto -> %s (%s)", name, value, reason)
        return resolved

    def _max_model_len(self, positions: int) -> int:
        if self.max_model_len is None:
            return positions
        if self.max_model_len > positions:
            raise OptionError(
                f"max_model_len={self.max_model_len} is too large",
                limit=f"the model has {positions} positions",
                remedy=f"use at most {positions}",
                option="max_model_len",
                value=self.max_model_len,
            )
        return self.max_model_len

    def _max_num_batched_tokens(self, max_model_len: int, device: Device) -> int:
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        longest = max_model_len
        if device.own_memory and self.max_model_len is None:
            longest = min(longest, _MOST_DEFAULT_BATCHED_TOKENS)
        return max(_MIN_BATCHED_TOKENS, longest)

    def _cache(self, model: ModelConfig, max_model_len: int, dtype: torch.dtype, device: Device) -> CacheSize | None:
        """`None` if it will be measured on the device. Includes block 0, which is reserved for padding."""
        bytes_per_block = block_bytes(model, block_size=self.block_size, dtype=dtype)
        if self.kv_cache_memory is not None:
            memory, source = self.kv_cache_memory, "set by kv_cache_memory"
        elif not device.own_memory:
            one_text = -(-max_model_len // self.block_size) + 1
            memory = max(_MIN_KV_CACHE_BYTES, one_text * bytes_per_block)
            source = "the default for CPUs" if memory == _MIN_KV_CACHE_BYTES else "made for one text of max_model_len"
        else:
            return None
        num_blocks = memory // bytes_per_block
        if num_blocks < 2:
            raise OptionError(
                f"kv_cache_memory={memory} bytes is too small",
                limit=f"it holds {num_blocks} blocks of {self.block_size} tokens, and 2 are needed",
                remedy=f"use at least {2 * bytes_per_block}, or a smaller block_size",
                option="kv_cache_memory",
                value=memory,
            )
        return CacheSize(num_blocks=num_blocks, source=source)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """Options with every `auto` resolved, and the reasons. Workers get only the fields of `WorkerStart`."""

    options: EngineConfig
    model: ModelConfig
    matched: MatchedFiles | None  # None: dummy weights
    checkpoint_notes: tuple[str, ...]  # sentences for the user
    routing: RoutingSpec
    dbo_source: str  # the environment setting that decided `dbo`, if any
    device_kind: str
    device_reason: str
    dtype_name: str
    transport: TransportSpec
    transport_reason: str
    max_model_len: int
    max_num_batched_tokens: int
    cache: CacheSize | None  # None: measured when the weights are loaded
    # set when the ranks have started
    device_name: str = ""
    attention: str = ""  # the backend and the reason
    data_path: DataPath | None = None
    captured: CaptureReport | None = None

    def started(
        self,
        *,
        device_name: str,
        transport_name: str,
        data_path: DataPath,
        cache: CacheSize,
        attention: str = "",
        captured: CaptureReport | None = None,
    ) -> ResolvedConfig:
        """Add what only the started ranks know, such as whether their devices can access each other's memory."""
        started = replace(
            self, device_name=device_name, data_path=data_path, cache=cache, attention=attention, captured=captured
        )
        if self.options.attention_backend == "auto":
            logger.info("attention_backend: auto -> %s", attention)
        if self.options.policy.dbo == "auto" and self.data_path is None:
            logger.info("dbo: auto -> %s", started.resolved_policy.reason)
        if self.options.transport != "auto" or transport_name == self.transport.name:
            return started
        reason = f"not {self.transport}, because not all of these devices can access each other's memory"
        logger.info("transport: auto -> %s (%s)", transport_name, reason)
        return replace(started, transport=TransportSpec(name=transport_name), transport_reason=reason)

    def with_end_tokens(self, token_ids: Sequence[int]) -> ResolvedConfig:
        """Set the end-of-sequence tokens, for workers, which do not load the tokenizer."""
        return replace(self, model=replace(self.model, eos_token_ids=tuple(token_ids)))

    @property
    def device(self) -> Device:
        """The first of the devices, which stands for the capabilities of all."""
        return find_device(self.device_kind)

    @property
    def policy(self) -> OverlapPolicy:
        """The requested policy, resolved."""
        return self.resolved_policy.policy

    @property
    def resolved_policy(self) -> ResolvedPolicy:
        """The requested policy, resolved, with the reason."""
        return self.resolve_policy(self.options.policy)

    def resolve_policy(self, policy: OverlapPolicy) -> ResolvedPolicy:
        """Resolve another policy for these devices. `auto` stays open until the ranks know their data path."""
        if self.data_path is None:
            cause = "resolved when the ranks know whether their devices reach each other"
            return ResolvedPolicy(policy, cause if policy.dbo == "auto" else "")
        measured = self.captured is not None and bool(self.captured.measured)
        conditions = Conditions(device_kind=self.device_kind, data_path=self.data_path, decode_measured=measured)
        return resolve_policy(policy, conditions)

    @property
    def ladders(self) -> dict[int, tuple[int, ...]]:
        """The sizes of padded steps, by number of lanes; none for steps that are to be eager."""
        options, policy = self.options, self.options.policy
        if options.cuda_graph_sizes is not None:
            sizes = parse_graph_sizes(options.cuda_graph_sizes)
        else:
            sizes = tuple(default_ladder()) if self.device.capturable else ()
        if options.enforce_eager or not sizes:
            return {}
        limit = self.max_num_batched_tokens  # buffers hold no more rows
        most = min(options.max_num_seqs, limit)
        ladders = {1: ladder_up_to(sizes, most, limit=limit)}
        if policy.dbo != "off" and policy.splits_all_layers and (options.ranks > 1 or policy.dbo == "on"):
            lanes = policy.micro_batches
            ladders[lanes] = ladder_up_to(sizes, -(-most // lanes), limit=limit)
        return ladders

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that fit into the KV cache of one rank; on a GPU, known once the ranks have started."""
        assert self.cache is not None, "the cache is not measured yet"
        return (self.cache.num_blocks - 1) * self.options.block_size

    def without_effect(self) -> list[str]:
        """One sentence for each option that has no effect in this configuration."""
        options, policy = self.options, self.policy
        off = "dbo='off'" if options.policy.dbo == "off" else "dbo='auto', which is off here"
        sentences = policy.without_effect(off) + overruled_dbo(options.policy, self.dbo_source)
        is_measured = options.kv_cache_memory is None and self.device.own_memory
        if options.gpu_memory_utilization != OPTION_DEFAULTS["gpu_memory_utilization"] and not is_measured:
            assert self.cache is not None
            sentences.append(
                f"gpu_memory_utilization={options.gpu_memory_utilization} has no effect: the size of the KV cache is "
                f"{self.cache.source}"
            )
        if not options.async_scheduling and not self.device.queues:
            sentences.append("async_scheduling=False has no effect: steps on a CPU are never launched ahead")
        if options.enforce_eager and options.cuda_graph_sizes is not None:
            sentences.append(f"cuda_graph_sizes={options.cuda_graph_sizes} has no effect: enforce_eager is set")
        return sentences

    def cache_facts(self) -> dict[str, Any]:
        """The size of the KV cache for the statistics; known once the ranks have started."""
        assert self.cache is not None, "the cache is not measured yet"
        return {"tokens": self.kv_capacity_tokens, "source": self.cache.source}

    def chosen(self) -> list[tuple[str, str, str]]:
        """(option, value, reason) of every resolved `auto`."""
        chosen = []
        if self.options.device == "auto":
            chosen.append(("device", self.device_kind, self.device_reason))
        if "auto" in self.options.transport or self.options.transport == "simulated":
            chosen.append(("transport", str(self.transport), self.transport_reason))
        if self.options.policy.dbo != self.policy.dbo:
            chosen.append(("dbo", self.policy.dbo, self.resolved_policy.cause))
        if self.options.dtype == "auto":
            reason = "the fastest on GPUs" if self.device.own_memory else "exact and fast on CPUs"
            chosen.append(("dtype", self.dtype_name, reason))
        return chosen
