"""What the keys of vLLM-Ascend's `additional_config` mean here, or why one is refused and what to use.

The names are those of all its versions that had dual-batch overlap, 0.8.5 to 0.11. Keys that only tune its graphs,
scheduler or memory layout are ignored with a note; keys that ask for something that does not exist here are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from antiphon.config.graph_sizes import only_sizes
from antiphon.core.errors import OptionError
from antiphon.core.sizes import joined_sizes

_Result = tuple[Mapping[str, Any], list[str]]
"""Our options, and notes for the user."""
_Key = Callable[[str, Any], _Result]
"""Gets the path of the key, and its value. Raises `OptionError` if it is refused."""


def additional_config(name: str, value: object) -> _Result:
    """Our options, and a sentence for each key without effect. Raises `OptionError` for a key that is refused."""
    config, idle = _without_idle_sizes(
        name, as_object(name, value), sizes="torchair_graph_batch_sizes", switch="enable_graph_mode"
    )
    own, notes = _keys(name, config, _KEYS)
    return own, notes + idle


def as_object(name: str, value: object) -> dict[str, Any]:
    """Raises `OptionError` if it is no JSON object."""
    if not isinstance(value, dict):
        raise OptionError(
            f"{name}={value!r} is not an object", remedy='use one such as {"key": "value"}', option=name, value=value
        )
    return value


def _keys(name: str, config: Mapping[str, Any], known: Mapping[str, _Key]) -> _Result:
    own: dict[str, Any] = {}
    notes = []
    for key, value in config.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
            raise OptionError(f"{name}: {key!r} is not a known key", remedy=hint, option=name, value=key)
        meant, told = known[key](f"{name}: {key}", value)
        for option, number in meant.items():
            if own.setdefault(option, number) != number:
                raise OptionError(
                    f"{name} means both {option}={own[option]!r} and {number!r}",
                    remedy="leave one of them out",
                    option=option,
                    value=number,
                )
        notes += told
    return own, notes


# ---- meanings


def _same_as(ours: str) -> _Key:
    return lambda where, value: ({} if value is None else {ours: value}, [])


def _always_so(where: str, value: object) -> _Result:
    """Note that off has no effect."""
    return {}, [] if value else [f"{where}={value!r} has no effect: it is always on"]


def _no_effect(reason: str) -> _Key:
    """Note that any value but off, zero and empty has no effect."""
    return lambda where, value: ({}, [f"{where}={value!r} has no effect: {reason}"] if value else [])


def _refused(*accepted: object, fact: str, remedy: str) -> _Key:
    """Refuse every value but off and those that describe what happens here anyway."""

    def meaning(where: str, value: object) -> _Result:
        if value and value not in accepted:
            raise OptionError(f"{where}={value!r}", limit=fact, remedy=remedy, option=where, value=value)
        return {}, []

    return meaning


def _graph_mode(where: str, value: object) -> _Result:
    """Graphs are on unless `enforce_eager` turns them off, so only turning them on means something."""
    return {"enforce_eager": False} if value else {}, []


def _graph_sizes(where: str, value: Any) -> _Result:
    return {"cuda_graph_sizes": only_sizes(joined_sizes(value))} if value else {}, []


def _without_idle_sizes(
    where: str, config: dict[str, Any], *, sizes: str, switch: str
) -> tuple[dict[str, Any], list[str]]:
    """The configuration without sizes of graphs that are not switched on, and a note if it had some."""
    if config.get(switch) or not config.get(sizes):
        return config, []
    rest = {key: value for key, value in config.items() if key != sizes}
    return rest, [f"{where}: {sizes}={config[sizes]!r} has no effect: {switch} is not set"]


def _graphs(*known: str, **keys: _Key) -> _Key:
    """The configuration of a kind of graphs. known: its keys that have no effect here. keys: its other keys."""
    meanings = {"enabled": _graph_mode, **dict.fromkeys(known, _no_effect(_OUR_GRAPHS)), **keys}

    def meaning(where: str, value: object) -> _Result:
        config, idle = _without_idle_sizes(where, as_object(where, value), sizes="graph_batch_sizes", switch="enabled")
        own, notes = _keys(where, config, meanings)
        return own, notes + idle

    return meaning


def _scheduler(where: str, value: object) -> _Result:
    config = as_object(where, value)
    if not config.get("enabled", True):
        return {}, []
    own, notes = _keys(where, config, _SCHEDULER_KEYS)
    if config.get("enabled", False):
        notes.append(
            f"{where}: the only scheduler serves requests in the order of arrival; "
            "chunked_prefill=False keeps prompts whole, as vLLM-Ascend's does"
        )
    return own, notes


def _feature(reason: str) -> _Key:
    """An object with a switch, for something that only makes an NPU faster."""

    def meaning(where: str, value: object) -> _Result:
        enabled = as_object(where, value).get("enabled", False)
        return {}, [f"{where} has no effect: {reason}"] if enabled else []

    return meaning


# ---- the tables

_NO_TENSOR_PARALLELISM = {"fact": "there is no tensor parallelism yet", "remedy": "leave it out, and use ranks=N"}
_EXPERTS_STAY = {"fact": "experts are placed in order and do not move at run time", "remedy": "leave it out"}
_OF_DYNAMIC_EPLB = _no_effect("experts do not move at run time")
_ONE_ORDER = {"fact": "requests are served in the order of arrival", "remedy": "use 'fcfs'"}

_OUR_GRAPHS = "decode steps are captured whole, without a compiler"

_TORCHAIR_KEYS = (
    *("mode", "graph_batch_sizes_init", "use_cached_graph", "enable_view_optimize"),
    *("use_cached_kv_cache_bytes", "enable_frozen_parameter", "enable_multistream_mla", "enable_multistream_moe"),
    *("enable_kv_nz", "enable_super_kernel"),
)

_SCHEDULER_KEYS: dict[str, _Key] = {
    "enabled": lambda where, value: ({}, []),
    "enable_chunked_prefill": _same_as("chunked_prefill"),
    "chunked_prefill_enabled": _same_as("chunked_prefill"),
    "max_num_batched_tokens": _same_as("max_num_batched_tokens"),
    "max_num_seqs": _same_as("max_num_seqs"),
    "max_model_len": _same_as("max_model_len"),
    "policy": _refused("fcfs", **_ONE_ORDER),
    "num_scheduler_steps": _refused(
        1, fact="one step is scheduled at a time, while the one before runs", remedy="leave it out"
    ),
    "enable_pd_transfer": _refused(fact="prefill and decode run on the same ranks", remedy="leave it out"),
    "long_prefill_token_threshold": _no_effect("a prompt may fill a whole step; use max_num_batched_tokens"),
    "max_long_partial_prefills": _no_effect("a prompt may fill a whole step; use max_num_batched_tokens"),
    "max_num_partial_prefills": _no_effect("a prompt may fill a whole step; use max_num_batched_tokens"),
    "decode_max_num_seqs": _no_effect("max_num_seqs is the only limit"),
}

_KEYS: dict[str, _Key] = {
    # overlap
    "min_total_tokens_to_split": _same_as("min_total_tokens_to_split"),
    "min_prefill_tokens_to_split": _same_as("min_prefill_tokens_to_split"),
    "imbalance_ratio": _same_as("imbalance_ratio"),
    "num_micro_batches": _same_as("micro_batches"),
    "multistream_overlap_shared_expert": _always_so,
    # ranks
    "expert_tensor_parallel_size": _refused(
        1, "0", "1", fact="each expert is whole on one rank", remedy="leave it out, and use ranks=N"
    ),
    "enable_inter_dp_scheduling": _always_so,
    "enable_shared_expert_dp": _always_so,
    "lmhead_tensor_parallel_size": _refused(1, **_NO_TENSOR_PARALLELISM),
    "oproj_tensor_parallel_size": _refused(1, **_NO_TENSOR_PARALLELISM),
    "expert_map_path": _refused(**_EXPERTS_STAY),
    "dynamic_eplb": _refused(**_EXPERTS_STAY),
    "init_redundancy_expert": _refused(fact="each expert is on exactly one rank", remedy="leave it out"),
    "num_iterations_eplb_update": _OF_DYNAMIC_EPLB,
    "num_wait_worker_iterations": _OF_DYNAMIC_EPLB,
    "gate_eplb": _OF_DYNAMIC_EPLB,
    "expert_map_record_path": _OF_DYNAMIC_EPLB,
    # graphs
    "torchair_graph_config": _graphs(*_TORCHAIR_KEYS, graph_batch_sizes=_graph_sizes),
    "enable_graph_mode": _graph_mode,
    "torchair_graph_batch_sizes": _graph_sizes,
    "init_torchair_graph_batch_sizes": _no_effect("the sizes are those of torchair_graph_batch_sizes, or the default"),
    "trace_recompiles": _no_effect("torch.compile is not used"),
    "xlite_graph_config": _graphs("full_mode"),
    # the rest
    "ascend_scheduler_config": _scheduler,
    "kv_cache_dtype": _refused("auto", fact="the KV cache has the dtype of the computation", remedy="leave it out"),
    "chunked_prefill_for_mla": _no_effect("each kind of model has one attention"),
    "enable_prefill_optimizations": _no_effect("each kind of model has one attention"),
    "weight_prefetch_config": _feature("weights are always on their device"),
    "enable_weight_nz_layout": _no_effect("it is a memory layout of NPUs"),
    "enable_cpu_binding": _no_effect("the operating system places processes"),
    "refresh": _no_effect("there is nothing to refresh"),
}
