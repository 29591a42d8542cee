"""When to split a step: the options that every rank must share."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, fields

from antiphon.core.errors import OptionError, is_number, is_whole, out_of_range, unknown_value
from antiphon.core.plan import MAX_LANES

DBO_MODES = ("auto", "on", "off")

SPLIT_RULES = ("token", "request-boundary")
"""The cut rules that `splitting` implements."""

DEFAULT_PREFILL_THRESHOLD = 512
DEFAULT_DECODE_THRESHOLD = 32

NEVER = 2**62
"""A threshold that no step reaches."""

OPTION_NAMES = {
    "dbo": "dbo",
    "split": "split",
    "micro_batches": "micro_batches",
    "prefill_threshold": "dbo_prefill_token_threshold",
    "decode_threshold": "dbo_decode_token_threshold",
    "imbalance_ratio": "imbalance_ratio",
    "min_total_tokens": "min_total_tokens_to_split",
    "min_prefill_tokens": "min_prefill_tokens_to_split",
    "start_layer": "dbo_start_layer",
    "end_layer": "dbo_end_layer",
}
"""Field of `OverlapPolicy` -> the option by which users know it."""

_WHOLE_NUMBERS = {
    **dict.fromkeys(
        ("prefill_threshold", "decode_threshold", "min_total_tokens", "min_prefill_tokens"), "a count of tokens"
    ),
    **dict.fromkeys(("start_layer", "end_layer"), "the number of a layer"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapPolicy:
    """Dual-batch overlap: whether, from which size on, and where to cut.

    dbo: `on` splits every step that can be cut (from the thresholds on, if they are given), `off` none, `auto` from
        the thresholds on, which `planning.resolve_policy` chooses where they are not given.
    split: the cut rule, `token` or `request-boundary`. micro_batches: lanes of a split step, 2 to `MAX_LANES`.
    prefill_threshold, decode_threshold: tokens on the busiest rank from which a step is split, or `NEVER`; `None` is no
        threshold under `on`, and 512 and 32 under an unresolved `auto`. The decode threshold holds where that
        rank only decodes.
    imbalance_ratio: how far from the middle a request boundary may lie, as a share of the tokens. The lanes of a split
        step, one after another, may be longer than the serial step by twice this share, else it is not split.
    min_total_tokens, min_prefill_tokens: a step with fewer tokens on the busiest rank is not split, nor is one with
        prefill there, but with fewer tokens of it. They hold under `on` too, beside the thresholds.
    start_layer, end_layer: layers from the first up to, but not including, the last run split, the others whole;
        `None` is the end of the model.
    Raises `OptionError` for a value out of range.
    """

    dbo: str = "auto"
    split: str = "token"
    micro_batches: int = 2
    prefill_threshold: int | None = None
    decode_threshold: int | None = None
    imbalance_ratio: float = 0.1
    min_total_tokens: int = 0
    min_prefill_tokens: int = 0
    start_layer: int = 0
    end_layer: int | None = None

    def __post_init__(self) -> None:
        if self.dbo not in DBO_MODES:
            raise unknown_value("dbo", self.dbo, DBO_MODES)
        if self.split not in SPLIT_RULES:
            raise unknown_value("split", self.split, SPLIT_RULES)
        if not is_whole(self.micro_batches) or not 2 <= self.micro_batches <= MAX_LANES:
            raise out_of_range("micro_batches", self.micro_batches, f"2 to {MAX_LANES}")
        for name, what in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is None and _DEFAULTS[name] is None:
                continue
            if not is_whole(value) or value < 0:
                option = OPTION_NAMES[name]
                raise OptionError(
                    f"{option}={value!r} is not {what}", remedy="use 0 or more", option=option, value=value
                )
        if self.end_layer is not None and self.end_layer <= self.start_layer:
            raise OptionError(
                f"dbo_start_layer={self.start_layer} and dbo_end_layer={self.end_layer} leave no layer to split",
                remedy="use an end above the start, or dbo='off'",
                option="dbo_end_layer",
                value=self.end_layer,
            )
        if not is_number(self.imbalance_ratio) or not 0 <= self.imbalance_ratio <= 1:
            raise out_of_range("imbalance_ratio", self.imbalance_ratio, "a number from 0 to 1")

    @property
    def splits_all_layers(self) -> bool:
        return self.start_layer == 0 and self.end_layer is None

    def threshold(self, *, decode_only: bool) -> int:
        """Tokens on the busiest rank from which a step is split."""
        chosen = self.decode_threshold if decode_only else self.prefill_threshold
        if chosen is not None:
            return chosen
        if self.dbo == "on":
            return 0
        return DEFAULT_DECODE_THRESHOLD if decode_only else DEFAULT_PREFILL_THRESHOLD

    def fingerprint(self) -> int:
        """Equal for equal policies; the ranks compare it before every step."""
        values = asdict(self) | {"imbalance_ratio": float(self.imbalance_ratio)}
        return zlib.crc32(repr(sorted(values.items())).encode())

    def without_effect(self, off: str = "dbo='off'") -> list[str]:
        """One sentence for each option that this policy does not use. off: what switches it off, where it is off."""
        if self.dbo != "off":
            if self.split == "token" and self.imbalance_ratio != _DEFAULTS["imbalance_ratio"]:
                return [f"imbalance_ratio={self.imbalance_ratio} has no effect with split='token', which cuts anywhere"]
            return []
        return [
            f"{option}={getattr(self, name)} has no effect with {off}: no step is split"
            for name, option in OPTION_NAMES.items()
            if name not in ("dbo", "split", "micro_batches") and getattr(self, name) != _DEFAULTS[name]
        ]

    def describe(self) -> str:
        """One line for the start-up block."""
        if self.dbo == "off":
            return "off: every step is serial"
        limits = self.describe_thresholds()
        if self.min_total_tokens or self.min_prefill_tokens:
            limits += f", at least {self.min_total_tokens} in all and {self.min_prefill_tokens} of prompts"
        if self.start_layer or self.end_layer is not None:
            limits += f", layers {self.start_layer} to {'the last' if self.end_layer is None else self.end_layer - 1}"
        return f"{self.dbo}: {self.micro_batches} micro-batches, cut by {self.split}, {limits}"

    def describe_thresholds(self) -> str:
        """The sizes from which steps are split, in words."""
        prefill, decode = self.threshold(decode_only=False), self.threshold(decode_only=True)
        if not prefill and not decode:
            return "always"
        if decode >= NEVER:
            return f"from {prefill} tokens a rank in prefill, never in decode"
        if prefill >= NEVER:
            return f"from {decode} tokens a rank in decode, never in prefill"
        return f"from {prefill} tokens a rank in prefill and {decode} in decode"


_DEFAULTS = {field.name: field.default for field in fields(OverlapPolicy)}
