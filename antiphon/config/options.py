"""The single declaration of every engine option; the overlap options are declared in `antiphon.core.policy`.

`OPTIONS` has all of them. The keyword arguments of `LLM`, the command line, the config file, the tables in
docs/options.md and the check for unknown names are generated from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from antiphon.config.graph_sizes import parse_graph_sizes
from antiphon.core.bundled import BUNDLED_MODEL
from antiphon.core.errors import OptionError
from antiphon.core.options import Option, instance_of, number, one_of, option, options_of, whole
from antiphon.core.policy import OverlapPolicy
from antiphon.core.sizes import asks_for_what_fits

LOAD_FORMATS = ("auto", "dummy")
DTYPE_NAMES = ("float32", "bfloat16", "float64")

_DEVICE_KINDS = ("cpu", "cuda", "xpu", "npu", "generic", "generic:cuda", "generic:cpu")
"""The keys of `antiphon.device.table.DEVICES`, repeated here to avoid importing torch; a test compares them."""

ATTENTION_BACKENDS = ("auto", "triton", "cudnn", "flashinfer", "torch")
"""`auto` and the names in `antiphon.kernels.attention.registry`, repeated for the same reason."""

_MODEL = "Model and ranks"
_STEPS = "Steps and memory"
_LONGEST_TIMEOUT_S = 86_400

_text = instance_of(str, "a string")
_flag = instance_of(bool, "True or False")
_count = whole(1)


def own_attention_backend(value: object) -> str | None:
    """Our name of an attention backend as we or vLLM call it, such as "TRITON_ATTN"; `None` if it is neither."""
    name = str(value).lower().removesuffix("_attn").removesuffix("_mla")
    name = "torch" if name == "torch_sdpa" else name
    return name if name in ATTENTION_BACKENDS else None


def _dtype(name: str, value: object) -> None:
    if value in ("half", "float16"):
        raise OptionError(
            f"{name}={value!r} is not supported",
            limit="the range of float16 is too small for some models",
            remedy="use 'bfloat16' or 'float32'",
            option=name,
            value=value,
        )
    one_of(("auto", *DTYPE_NAMES))(name, value)


def _graph_sizes(name: str, value: object) -> None:
    parse_graph_sizes(value if isinstance(value, str) else repr(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options as the user requested them, without the overlap options."""

    model: str = option(
        BUNDLED_MODEL,
        check=_text,
        group=_MODEL,
        help="Folder of a checkpoint, id of one on the hub, tiny-deepseek (bundled), or a preset of dummy weights.",
        doc="[models.md](models.md) lists the presets.",
    )
    revision: str | None = option(
        None, help="Branch, tag or commit of a model on the hub.", shown_default="the hub's `main`"
    )
    load_format: str = option(
        "auto",
        check=one_of(LOAD_FORMATS),
        help="auto: the checkpoint's weights. dummy: random weights, prompts of token ids.",
        doc="`dummy` is for measurements; texts are empty.",
    )
    num_layers: int | None = option(
        None,
        check=_count,
        help="Load only the first N layers.",
        shown_default="all",
        doc="At least one must have experts.",
    )
    routing: str = option(
        "model",
        check=_text,
        help="Routing with dummy weights: model, uniform, zipf:A or recorded:FILE.",
        doc="`model`: the random routers choose. `zipf:A`: the share of the k-th expert is proportional to 1 / k^A.",
    )
    ranks: int = option(
        1,
        check=_count,
        help="Number of processes that share the experts.",
        doc="It must divide the number of experts. Attention is data-parallel: a request lives on one rank.",
    )
    device: str = option(
        "auto",
        help=f"Kind of device: auto, {', '.join(_DEVICE_KINDS)}; one device per rank. auto: cuda if there are enough.",
        doc="`auto` follows the environment variable `ANTIPHON_DEVICE`, else chooses `cuda` or `cpu`, with a warning"
        " if that leaves GPUs idle. `xpu` and `npu` have never run on their hardware; tests run the same "
        "code as `generic:cpu` and `generic:cuda` ([architecture.md](architecture.md#devices)).",
    )
    transport: str = option(
        "auto",
        check=_text,
        help="auto, local, allgather, alltoall, copy-engine, one-sided, host-staged, shared-memory, "
        "or simulated:INNER:BANDWIDTH:LATENCY.",
        doc="See [below](#transports).",
    )
    peer_access: bool = option(
        True,
        check=_flag,
        help="Allow GPUs to read each other's memory (NCCL_P2P_DISABLE=1 forbids it too).",
        doc="Forbidding it here also forbids it to NCCL.",
    )
    dtype: str = option(
        "auto",
        check=_dtype,
        help=f"Data type of weights and activations: auto, {', '.join(DTYPE_NAMES)}.",
        doc="`auto`: `bfloat16` on GPUs, `float32` on CPUs. `float32` on GPUs is exact (no TF32) but slow.",
    )
    attention_backend: str = option(
        "auto",
        check=one_of(ATTENTION_BACKENDS),
        help=f"What computes the attention of decoding requests: {', '.join(ATTENTION_BACKENDS)}.",
        doc="`auto`: `triton` on CUDA devices of compute capability 8.0 and later, else `torch`. See "
        "[below](#attention-backends).",
    )
    max_num_batched_tokens: int | None = option(
        None,
        size="count",
        check=_count,
        group=_STEPS,
        help="Maximum number of tokens per step on one rank.",
        shown_default="`max_model_len`, at least 2048; on a GPU at most 8192 unless `max_model_len` is given",
    )
    max_num_seqs: int = option(
        256, size="count", check=_count, help="Maximum number of requests that run at once on one rank."
    )
    max_model_len: int | None = option(
        None,
        size="count",
        check=_count,
        help="Maximum length of a sequence, prompt and output together, in tokens, such as 32k.",
        shown_default="the model's positions",
    )
    block_size: int = option(16, size="count", check=_count, help="Tokens per block of the KV cache.")
    kv_cache_memory: int | None = option(
        None,
        size="bytes",
        check=_count,
        help="Size of the KV cache of one rank in bytes, such as 20G.",
        shown_default="on a CPU 256 MiB, or what one longest text needs; on a GPU what `gpu_memory_utilization` leaves",
    )
    gpu_memory_utilization: float = option(
        0.9,
        check=number(0, 1, without_least=True),
        help="Share of a GPU's memory to use; the KV cache gets what the rest leaves free.",
        doc="At startup every rank runs the largest step once, unsplit; the rank with the least memory left decides.",
    )
    prefix_caching: bool = option(
        True,
        check=_flag,
        help="Compute shared prefixes once.",
        doc="Full KV blocks are shared between requests with a common prefix, including finished ones.",
    )
    chunked_prefill: bool = option(
        True,
        check=_flag,
        help="Fill the rest of a step with part of a prompt.",
        doc="Without it, only prompts longer than a whole step are cut.",
    )
    enforce_eager: bool = option(
        False,
        check=_flag,
        help="Launch every step kernel by kernel, without CUDA graphs.",
        doc="For debugging: steps that only decode are several times slower on a GPU.",
    )
    cuda_graph_sizes: str | None = option(
        None,
        size="list",
        check=_graph_sizes,
        help="Sequences per lane for which decode steps are captured as CUDA graphs, such as 1,2,4,8; or the largest.",
        shown_default="1, 2, 4, 8, then steps of 8 to 64, of 16 to 256 and of 32 to 512, up to `max_num_seqs`",
        doc="A step is padded to the next size; one with more sequences is eager. A single number is the largest size: "
        "32 means the default sizes up to 32, and `32,` only 32. A list also works. On a CPU steps are padded to the "
        "sizes given here, but nothing is captured.",
    )
    async_scheduling: bool = option(
        True,
        check=_flag,
        help="Prepare and launch a step while the one before still runs on the device.",
        doc="A request that ends by an end-of-sequence token computes one token too many, which is dropped. Has no "
        "effect on a CPU.",
    )
    seed: int = option(
        0, check=whole(0, 2**62 - 1), help="Seed of dummy weights, and of requests without a seed of their own."
    )
    timeout_s: float = option(
        120.0,
        check=number(0, _LONGEST_TIMEOUT_S, without_least=True),
        help="Maximum time to wait for another process, in seconds.",
    )
    debug_order: bool = option(False, help="Compare the collectives of all ranks before every step.")


def _grouped() -> dict[str, Option]:
    """All options in the order of the docs and --help: the overlap options stand between the other groups."""
    own = options_of(EngineOptions)
    groups = [{name: one for name, one in own.items() if one.group == group} for group in (_MODEL, _STEPS)]
    return {**groups[0], **options_of(OverlapPolicy), **groups[1]}


OPTIONS: Mapping[str, Option] = MappingProxyType(_grouped())
"""Every option of an engine, by the name that users type."""

OPTION_DEFAULTS: Mapping[str, Any] = MappingProxyType({name: one.default for name, one in OPTIONS.items()})


def parse_option(name: str, value: Any, *, alias: str = "") -> Any:
    """The value of option `name`, with a size such as "32k" as a number. alias: the name that the user wrote."""
    if name == "max_model_len" and value == -1:
        raise asks_for_what_fits(f"{alias or name}={value}", alias or name, value)  # as "auto", also in vLLM
    return OPTIONS[name].parse(value, alias=alias)
