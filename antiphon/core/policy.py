"""The overlap policy: options that decide when to split a step, equal on all ranks."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass

from antiphon.core.errors import OptionError
from antiphon.core.options import check_options, number, one_of, option, options_of, whole
from antiphon.core.plan import MAX_LANES

DBO_MODES = ("auto", "on", "off")

SPLIT_RULES = ("token", "request-boundary")
"""The cut rules that `splitting` implements."""

DEFAULT_PREFILL_THRESHOLD = 512
DEFAULT_DECODE_THRESHOLD = 32

_GROUP = "Overlap"

NEVER = 2**62
"""A threshold that no step reaches."""

MEASURED = NEVER + 1
"""The same, for decode steps about which measurements at the start decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapPolicy:
    """Whether to split steps, from which size on, and where to cut them.

    The help of each option describes its field. A threshold of `None` means no threshold under `on`, and
    `DEFAULT_PREFILL_THRESHOLD` or `DEFAULT_DECODE_THRESHOLD` under an unresolved `auto`; no step reaches `NEVER`.
    Raises `OptionError` for a value out of range.
    """

    dbo: str = option(
        "auto",
        check=one_of(DBO_MODES),
        group=_GROUP,
        help=f"Dual-batch overlap: {', '.join(DBO_MODES)}. auto: split large steps where overlap has paid off on "
        "devices and links like these, else off; the start-up block says which and why.",
        doc="`auto` first follows the environment variable `ANTIPHON_DBO` (`on` or `1`, `off` or `0`), then "
        "`VLLM_ASCEND_ENABLE_DBO` (`1`: `on`), then the [rules below](#what-auto-does). `on`: split every step "
        "that can be cut, unless lanes are uneven across ranks (`imbalance_ratio`).",
    )
    split: str = option(
        "token",
        check=one_of(SPLIT_RULES),
        help=f"Where to cut a batch: {', '.join(SPLIT_RULES)}.",
        doc="`token`: anywhere. `request-boundary`: between requests if a boundary is near the middle "
        "(`imbalance_ratio`), else the step is not split. If a rank only decodes, both cut in the middle.",
    )
    micro_batches: int = option(
        2, check=whole(2, MAX_LANES), help=f"Number of parts of a split step, 2 to {MAX_LANES}."
    )
    prefill_threshold: int | None = option(
        None,
        name="dbo_prefill_token_threshold",
        size="count",
        check=whole(0),
        help="Minimum tokens on the busiest rank to split a step with prefill; also applies under auto.",
        shown_default="`auto` chooses; none under `on`",
    )
    decode_threshold: int | None = option(
        None,
        name="dbo_decode_token_threshold",
        size="count",
        check=whole(0),
        help="Minimum tokens on the busiest rank to split a step in which it only decodes; also applies under auto.",
        shown_default="`auto` chooses; none under `on`",
    )
    imbalance_ratio: float = option(
        0.1,
        check=number(0, 1),
        help="How far from the middle of a batch a request boundary may lie, as a share of its tokens.",
        doc="Used by `split=request-boundary`. It also bounds uneven lanes across ranks: a step is not split, even "
        "under `on`, if its lanes together take more than twice this share longer than the serial step.",
    )
    min_total_tokens: int = option(
        0,
        name="min_total_tokens_to_split",
        size="count",
        check=whole(0),
        help="Steps with fewer tokens on the busiest rank are not split, even under on.",
    )
    min_prefill_tokens: int = option(
        0,
        name="min_prefill_tokens_to_split",
        size="count",
        check=whole(0),
        help="Steps in which the busiest rank has prompt tokens, but fewer than this, are not split, even under on.",
    )
    start_layer: int = option(
        0,
        name="dbo_start_layer",
        check=whole(0),
        help="First layer that runs split, from 0; the layers before it run serially.",
    )
    end_layer: int | None = option(
        None,
        name="dbo_end_layer",
        check=whole(0),
        help="First layer, from 0, that no longer runs split; it and the layers after it run serially.",
        shown_default="the end of the model",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.end_layer is not None and self.end_layer <= self.start_layer:
            raise OptionError(
                f"dbo_start_layer={self.start_layer} and dbo_end_layer={self.end_layer} leave no layer to split",
                remedy="use an end above the start, or dbo='off'",
                option="dbo_end_layer",
                value=self.end_layer,
            )

    @property
    def splits_all_layers(self) -> bool:
        return self.start_layer == 0 and self.end_layer is None

    @property
    def measures_decode(self) -> bool:
        """Whether measurements decide about decode steps, where there are any."""
        return self.dbo == "auto" and self.decode_threshold == MEASURED

    def threshold(self, *, decode_only: bool) -> int:
        """Minimum number of tokens on the busiest rank to split a step."""
        chosen = self.decode_threshold if decode_only else self.prefill_threshold
        if chosen is not None:
            return chosen
        if self.dbo == "on":
            return 0
        return DEFAULT_DECODE_THRESHOLD if decode_only else DEFAULT_PREFILL_THRESHOLD

    def fingerprint(self) -> int:
        """A number that is equal for equal policies; the ranks compare it before every step."""
        values = asdict(self) | {"imbalance_ratio": float(self.imbalance_ratio)}
        return zlib.crc32(repr(sorted(values.items())).encode())

    def without_effect(self, off: str = "dbo='off'") -> list[str]:
        """One sentence for each option that this policy does not use. off: the setting that turns overlap off."""
        if self.dbo != "off":
            if self.split == "token" and self.imbalance_ratio != _OPTIONS["imbalance_ratio"].default:
                return [f"imbalance_ratio={self.imbalance_ratio} has no effect with split='token', which cuts anywhere"]
            return []
        return [
            f"{name}={value} has no effect with {off}: no step is split"
            for name, value in ((name, getattr(self, one.field)) for name, one in _OPTIONS.items())
            if name not in ("dbo", "split", "micro_batches") and value != _OPTIONS[name].default
        ]

    def describe(self) -> str:
        """One line for the start-up block."""
        if self.dbo == "off":
            return "off: every step is serial"
        limits = self.describe_thresholds()
        if self.min_total_tokens or self.min_prefill_tokens:
            limits += f", at least {self.min_total_tokens} in total and {self.min_prefill_tokens} of prompts"
        if self.start_layer or self.end_layer is not None:
            limits += f", layers {self.start_layer} to {'the last' if self.end_layer is None else self.end_layer - 1}"
        return f"{self.dbo}: {self.micro_batches} micro-batches, cut by {self.split}, {limits}"

    def describe_thresholds(self) -> str:
        """The minimum sizes of split steps, in words."""
        prefill, decode = self.threshold(decode_only=False), self.threshold(decode_only=True)
        if not prefill and not decode:
            return "always"
        if self.measures_decode:
            return f"{_from(prefill)} in prefill, as measured at the start in decode"
        if decode >= NEVER:
            return f"from {prefill} tokens per rank in prefill, never in decode"
        if prefill >= NEVER:
            return f"from {decode} tokens per rank in decode, never in prefill"
        return f"from {prefill} tokens per rank in prefill and {decode} in decode"


def _from(threshold: int) -> str:
    return "never" if threshold >= NEVER else f"from {threshold} tokens per rank"


_OPTIONS = options_of(OverlapPolicy)
