"""Options that users of other engines type: what each of them means here, or why it is refused and what to use.

One table, `FOREIGN_OPTIONS`, for the keyword arguments of `LLM` and the command line alike. It knows our options only
by name; whether their values can work is checked where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from antiphon.config.ascend_aliases import additional_config, as_object
from antiphon.config.graph_sizes import only_sizes
from antiphon.config.options import parse_option
from antiphon.core.errors import OptionError, is_whole, out_of_range, unknown_value
from antiphon.core.policy import DEFAULT_DECODE_THRESHOLD, DEFAULT_PREFILL_THRESHOLD
from antiphon.core.sizes import joined_sizes

_DBO_THRESHOLDS = {
    "dbo_decode_token_threshold": DEFAULT_DECODE_THRESHOLD,
    "dbo_prefill_token_threshold": DEFAULT_PREFILL_THRESHOLD,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What a foreign option with its value means.

    own: our options. unless_given: our options too, but the user's own values win. note: a sentence for the user.
    """

    own: Mapping[str, Any] = field(default_factory=dict)
    unless_given: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignOption:
    """One option of another engine.

    names: as keyword arguments, the usual one first; on the command line with dashes, single letters with one.
    kind: what its value is in that engine: flag, whole, count, bytes, sizes, number, text, words or json.
    meaning: gets the name that was used, and the value. Raises `OptionError` if it is refused.
    """

    names: tuple[str, ...]
    kind: str
    meaning: Callable[[str, Any], Meaning]

    @property
    def name(self) -> str:
        return self.names[0]


def foreign_option(name: str) -> ForeignOption | None:
    """Find an option by any of its names as a keyword argument."""
    return _BY_NAME.get(name)


@dataclass(frozen=True, slots=True)
class Translation:
    """Foreign options as ours. The fields are those of `Meaning`; said: our option -> the foreign one behind it."""

    own: dict[str, Any]
    unless_given: dict[str, Any]
    notes: list[str]
    said: dict[str, str]

    def check(self, name: str, value: object) -> None:
        """Raises `OptionError` if the user gives our option `name` another value."""
        if name in self.own and self.own[name] != value:
            raise OptionError(
                f"{self.said[name]} means {name}={self.own[name]!r}, but {name}={value!r} was given too",
                remedy="use only one of them",
                option=name,
                value=value,
            )


def translate(given: Mapping[str, Any], own_names: Iterable[str]) -> Translation:
    """Translate foreign options.

    Raises `OptionError` for one that is refused, is not known, or contradicts another one.
    """
    found = Translation({}, {}, [], {})
    for name, value in given.items():
        option = foreign_option(name)
        if option is None:
            raise unknown_option(name, own_names)
        meaning = Meaning() if value is None else option.meaning(name, value)
        for ours, value_meant in meaning.own.items():
            meant = parse_option(ours, value_meant, alias=name)
            found.check(ours, meant)
            found.own[ours] = meant
            found.said[ours] = f"{name}={value!r}"
        found.unless_given.update(meaning.unless_given)
        found.notes.extend([meaning.note] * bool(meaning.note))
    return found


def unknown_option(name: str, own_names: Iterable[str], *, dashes: bool = False) -> OptionError:
    """The error for an option that is neither ours nor another engine's, naming the nearest one of both."""
    ours = list(own_names)
    shown = _dashed if dashes else repr
    near = get_close_matches(name, ours, n=1, cutoff=0.6)
    near = near or get_close_matches(name, [*ours, *_BY_NAME], n=1, cutoff=0.4)
    hint = f"did you mean {shown(near[0])}?" if near else f"options are {', '.join(map(shown, ours))}"
    return OptionError(f"there is no option {shown(name)}", remedy=hint, option=name)


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ---- meanings


def _same_as(ours: str) -> Callable[[str, Any], Meaning]:
    return lambda name, value: Meaning(own={ours: value})


def _is_so(*accepted: object, fact: str, remedy: str) -> Callable[[str, Any], Meaning]:
    """Accept the values that describe what happens here anyway."""

    def meaning(name: str, value: object) -> Meaning:
        if not any(value == one and type(value) is type(one) for one in accepted):
            raise OptionError(f"{name}={value!r}", limit=fact, remedy=remedy, option=name, value=value)
        return Meaning()

    return meaning


def _not(ours: str) -> Callable[[str, Any], Meaning]:
    """A flag that switches our option off."""
    return lambda name, value: Meaning(own={ours: not value if isinstance(value, bool) else value})


def _refused(fact: str, remedy: str) -> Callable[[str, Any], Meaning]:
    """Refuse everything but off."""
    return _is_so(False, fact=fact, remedy=remedy)


def _refused_secret(fact: str, remedy: str) -> Callable[[str, Any], Meaning]:
    """Refuse an option whose value must not appear in the error."""

    def meaning(name: str, value: object) -> Meaning:
        raise OptionError(name, limit=fact, remedy=remedy, option=name)

    return meaning


def _no_effect(reason: str) -> Callable[[str, Any], Meaning]:
    return lambda name, value: Meaning(note=f"{name}={value!r} has no effect: {reason}")


def _enable_dbo(name: str, value: object) -> Meaning:
    if not isinstance(value, bool):
        raise OptionError(
            f"{name}={value!r} is neither True nor False",
            remedy="use True, False or dbo='auto'",
            option=name,
            value=value,
        )
    return Meaning(own={"dbo": "on"}, unless_given=_DBO_THRESHOLDS) if value else Meaning(own={"dbo": "off"})


def _num_ubatches(name: str, value: object) -> Meaning:
    return Meaning() if value == 0 else Meaning(own={"micro_batches": value})


def _all2all_backend(name: str, value: object) -> Meaning:
    near = {"allgather_reducescatter": "transport='allgather'", "naive": "transport='allgather'"}
    remedy = near.get(str(value), "transport='auto', which chooses the best one for this machine")
    raise OptionError(
        f"{name}={value!r}",
        limit="Antiphon has its own transports",
        remedy=f"use {remedy}",
        option=name,
        value=value,
    )


def _compilation_config(name: str, value: object) -> Meaning:
    """vLLM's configuration of graphs and compiler, or its level alone, as in `-O3`.

    A level of 0 also switches graphs off there, unless a graph mode is given.
    """
    config = {"mode": value} if is_whole(value) else as_object(name, value)
    own: dict[str, Any] = {}
    unless_given: dict[str, Any] = {}
    notes: list[str] = []
    for key, item in config.items():
        where, text = f"{name}: {key}", str(item).lower()
        if item is None:
            continue
        if key == "cudagraph_mode":
            if text not in _GRAPH_MODES:
                raise unknown_value(where, item, _GRAPH_MODES)
            own["enforce_eager"] = text in _NO_GRAPHS
            if text in _OTHER_GRAPHS:
                notes.append(f"{where}={item!r}: whole decode steps are captured, and steps with prompts are eager")
        elif key in ("mode", "level"):
            if text in _NO_GRAPHS:
                unless_given["enforce_eager"] = True
            else:
                notes.append(f"{where}={item!r} has no effect: torch.compile is not used")
        elif key == "cudagraph_capture_sizes":
            own |= _capture_sizes(where, item).own
        elif key == "max_cudagraph_capture_size":
            meaning = _largest_capture_size(where, item)
            own |= meaning.own
            unless_given |= meaning.unless_given
        elif item:
            raise OptionError(
                f"{where}={item!r} is not supported",
                limit="cudagraph_mode, cudagraph_capture_sizes, max_cudagraph_capture_size and mode are known",
                remedy="leave it out",
                option=name,
                value=value,
            )
    return Meaning(own=own, unless_given=unless_given, note="; ".join(notes))


_NO_GRAPHS = ("none", "0")
_OTHER_GRAPHS = ("piecewise", "1", "full", "2")
"""Modes that also capture steps with prompts, or only parts of a step."""
_GRAPH_MODES = (*_NO_GRAPHS, *_OTHER_GRAPHS, "full_decode_only", "full_and_piecewise")


def _capture_sizes(name: str, value: Any) -> Meaning:
    return Meaning(own={"cuda_graph_sizes": only_sizes(joined_sizes(value))} if value else {})


def _largest_capture_size(name: str, value: Any) -> Meaning:
    """The largest of the default sizes; explicit sizes win, and 0 is no graphs."""
    if not is_whole(value) or value < 0:
        raise out_of_range(name, value, "an integer of at least 0")
    return Meaning(unless_given={"cuda_graph_sizes": str(value)}) if value else Meaning(own={"enforce_eager": True})


def _additional_config(name: str, value: object) -> Meaning:
    own, notes = additional_config(name, value)
    return Meaning(own=own, note="; ".join(notes))


def _hf_overrides(name: str, value: object) -> Meaning:
    """vLLM-Ascend's first version of overlap was switched on by choosing its architecture."""
    if isinstance(value, dict) and value.keys() == {"architectures"}:
        names = value["architectures"]
        if names in (["DeepseekDBOForCausalLM"], ["CustomDeepseekDBOForCausalLM"]):
            return Meaning(own={"dbo": "on"})
    return _refused(*_OWN_CONFIG)(name, value)


# ---- the table

_USE_RANKS = "use ranks=N, which distributes requests and experts"
_OF_THE_SERVER = ("this is an option of the server", "leave it out, or use `antiphon serve`")
_NO_PARSERS = ("tool calls are not supported", "leave it out")
_ONE_HOST = ("all ranks run on one host", "leave it out, and use ranks=N")
_NOT_QUANTIZED = (
    "weights are never quantized at load time; checkpoints may be quantized to block-wise float8",
    "leave it out, or use such a checkpoint",
)
_OWN_TOKENIZER = (
    "the tokenizer is always the checkpoint's",
    "leave it out, or replace its files in the model's folder",
)
_OWN_CONFIG = ("config.json cannot be overridden", "leave it out, or edit config.json in a copy of the checkpoint")
_NO_ADAPTERS = ("LoRA adapters are not supported", "merge them into the checkpoint")
_PREEMPTION = "preempted requests are recomputed, not swapped"


def _option(names: str, kind: str, meaning: Callable[[str, Any], Meaning]) -> ForeignOption:
    return ForeignOption(names=tuple(names.split()), kind=kind, meaning=meaning)


FOREIGN_OPTIONS = (
    # overlap
    _option("enable_dbo enable_microbatching enable_two_batch_overlap", "flag", _enable_dbo),
    _option("microbatching_token_threshold", "count", _same_as("dbo_decode_token_threshold")),
    _option("num_ubatches ubatch_size", "whole", _num_ubatches),
    _option("additional_config", "json", _additional_config),
    # ranks
    _option("data_parallel_size dp dp_size", "whole", _same_as("ranks")),
    _option(
        "tensor_parallel_size tp tp_size",
        "whole",
        _is_so(1, fact="there is no tensor parallelism yet", remedy=_USE_RANKS),
    ),
    _option(
        "pipeline_parallel_size pp pp_size",
        "whole",
        _is_so(1, fact="there is no pipeline parallelism", remedy=_USE_RANKS),
    ),
    _option(
        "enable_expert_parallel",
        "flag",
        _is_so(
            True,
            fact="experts are always distributed over the ranks",
            remedy="use ranks=1 to keep all experts on one rank",
        ),
    ),
    _option(
        "expert_placement_strategy", "text", _is_so("linear", fact="experts are placed in order", remedy="use 'linear'")
    ),
    _option("enable_eplb", "flag", _refused("experts do not move at run time", "leave it out")),
    _option(
        "all2all_backend moe_a2a_backend",
        "text",
        _all2all_backend,
    ),
    _option(
        "distributed_executor_backend",
        "text",
        _is_so("mp", "uni", fact="all ranks run on one host", remedy="leave it out"),
    ),
    _option("data_parallel_size_local", "whole", _refused(*_ONE_HOST)),
    _option("data_parallel_address", "text", _refused(*_ONE_HOST)),
    _option("data_parallel_rpc_port", "whole", _refused(*_ONE_HOST)),
    _option("headless", "flag", _refused(*_ONE_HOST)),
    _option("disable_custom_all_reduce", "flag", _no_effect("there are no all-reduces")),
    # steps
    _option("compilation_config cc O", "json", _compilation_config),
    _option("cudagraph_capture_sizes cuda_graph_bs", "sizes", _capture_sizes),
    _option("max_cudagraph_capture_size cuda_graph_max_bs", "whole", _largest_capture_size),
    _option("disable_cuda_graph", "flag", _same_as("enforce_eager")),
    _option("disable_overlap_schedule", "flag", _not("async_scheduling")),
    _option("speculative_config", "json", _refused("there is no speculative decoding", "leave it out")),
    # cache and scheduling
    _option("enable_prefix_caching", "flag", _same_as("prefix_caching")),
    _option("enable_chunked_prefill", "flag", _same_as("chunked_prefill")),
    _option("kv_cache_memory_bytes", "bytes", _same_as("kv_cache_memory")),
    _option("mem_fraction_static", "number", _same_as("gpu_memory_utilization")),
    _option(
        "kv_cache_dtype",
        "text",
        _is_so("auto", fact="the KV cache has the dtype of the computation", remedy="use 'auto', or dtype"),
    ),
    _option(
        "num_gpu_blocks_override",
        "whole",
        _refused("the size of the KV cache is given in bytes", "use kv_cache_memory=BYTES"),
    ),
    _option("swap_space", "number", _no_effect(_PREEMPTION)),
    _option("cpu_offload_gb", "number", _is_so(0, 0.0, fact="weights stay on their device", remedy="use more ranks")),
    # model
    _option("model_path", "text", _same_as("model")),
    _option("trust_remote_code", "flag", _no_effect("code in checkpoints is never executed")),
    _option("quantization", "text", _refused(*_NOT_QUANTIZED)),
    _option("tokenizer", "text", _refused(*_OWN_TOKENIZER)),
    _option("tokenizer_mode", "text", _is_so("auto", fact="there is only one tokenizer mode", remedy="use 'auto'")),
    _option("tokenizer_revision", "text", _refused(*_OWN_TOKENIZER)),
    _option("code_revision", "text", _no_effect("code in checkpoints is never executed")),
    _option("hf_overrides", "json", _hf_overrides),
    _option("rope_scaling", "json", _refused(*_OWN_CONFIG)),
    _option(
        "generation_config",
        "text",
        _no_effect("sampling defaults always come from the checkpoint's generation_config.json"),
    ),
    _option(
        "download_dir",
        "text",
        _refused("downloads go into the cache of huggingface_hub", "use the environment variable HF_HUB_CACHE"),
    ),
    _option(
        "hf_token",
        "text",
        _refused_secret(
            "huggingface_hub reads the token from the environment", "use the environment variable HF_TOKEN"
        ),
    ),
    _option("enable_lora", "flag", _refused(*_NO_ADAPTERS)),
    _option("lora_modules", "words", _refused(*_NO_ADAPTERS)),
    _option(
        "task runner",
        "text",
        _is_so("generate", "auto", fact="generating text is the only task", remedy="leave it out"),
    ),
    # logs
    _option("disable_log_requests", "flag", _is_so(True, fact="requests are never logged", remedy="leave it out")),
    _option("enable_log_requests", "flag", _refused("requests are never logged", "leave it out")),
    _option("disable_log_stats", "flag", _is_so(True, False, fact="", remedy="")),
    # serving
    _option("host", "text", _refused(*_OF_THE_SERVER)),
    _option("port", "whole", _refused(*_OF_THE_SERVER)),
    _option("served_model_name", "words", _refused(*_OF_THE_SERVER)),
    _option("api_key", "text", _refused_secret(*_OF_THE_SERVER)),
    _option("allowed_origins", "words", _refused(*_OF_THE_SERVER)),
    _option("allowed_methods", "words", _refused(*_OF_THE_SERVER)),
    _option("allowed_headers", "words", _refused(*_OF_THE_SERVER)),
    _option("allow_credentials", "flag", _refused(*_OF_THE_SERVER)),
    _option("middleware", "words", _refused("the server runs no foreign code", "put a proxy in front")),
    _option("chat_template", "text", _refused("the chat template is always the checkpoint's", "leave it out")),
    _option("tool_call_parser", "text", _refused(*_NO_PARSERS)),
    _option("enable_auto_tool_choice", "flag", _refused(*_NO_PARSERS)),
    _option("reasoning_parser", "text", _refused(*_OF_THE_SERVER)),
    _option("default_chat_template_kwargs", "json", _refused(*_OF_THE_SERVER)),
)
"""In the order in which docs/options.md lists them."""

_BY_NAME = {name: option for option in FOREIGN_OPTIONS for name in option.names}
