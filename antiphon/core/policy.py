"""When to split a step: the options that every rank must share."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass

from antiphon.core.checks import is_number, is_whole
from antiphon.core.errors import OptionError, unknown_value
from antiphon.core.plan import MAX_LANES

__all__ = ["DBO_MODES", "SPLIT_RULES", "OverlapPolicy"]

DBO_MODES = ("auto", "on", "off")

SPLIT_RULES = ("token", "request-boundary")
"""The cut rules that `splitting` implements."""

DEFAULT_PREFILL_THRESHOLD = 512
DEFAULT_DECODE_THRESHOLD = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapPolicy:
    """Dual-batch overlap: whether, from which size on, and where to cut.

    dbo: `on` splits every step that can be cut (from the thresholds on, if they are given), `off` none, `auto` from
        the thresholds on.
    split: the cut rule, `token` or `request-boundary`. micro_batches: lanes of a split step, 2 to `MAX_LANES`.
    prefill_threshold, decode_threshold: tokens on the busiest rank from which a step is split; `None` takes 512 and
        32 under `auto` and no threshold under `on`. The decode threshold holds where that rank only decodes.
    imbalance_ratio: how far from the middle a request boundary may lie, as a share of the tokens.
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
            raise OptionError(f"micro_batches={self.micro_batches!r} is out of range; use 2 to {MAX_LANES}")
        for name in ("prefill_threshold", "decode_threshold"):
            value = getattr(self, name)
            if value is not None and (not is_whole(value) or value < 0):
                raise OptionError(
                    f"dbo_{name.replace('_', '_token_')}={value!r} is not a count of tokens; use 0 or more"
                )
        for name in ("min_total_tokens", "min_prefill_tokens"):
            value = getattr(self, name)
            if not is_whole(value) or value < 0:
                raise OptionError(f"{name}_to_split={value!r} is not a count of tokens; use 0 or more")
        for name, value in (("start_layer", self.start_layer), ("end_layer", self.end_layer)):
            if value is not None and (not is_whole(value) or value < 0):
                raise OptionError(f"dbo_{name}={value!r} is not the number of a layer; use 0 or more")
        if self.end_layer is not None and self.end_layer <= self.start_layer:
            raise OptionError(
                f"dbo_start_layer={self.start_layer} and dbo_end_layer={self.end_layer} leave no layer to split; "
                "use an end above the start, or dbo='off'"
            )
        if not is_number(self.imbalance_ratio) or not 0 <= self.imbalance_ratio <= 1:
            raise OptionError(f"imbalance_ratio={self.imbalance_ratio!r} is out of range; use a number from 0 to 1")

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

    def without_effect(self) -> list[str]:
        """One sentence for each option that this policy does not use."""
        if self.dbo != "off":
            return []
        options = {
            "dbo_prefill_token_threshold": self.prefill_threshold,
            "dbo_decode_token_threshold": self.decode_threshold,
        }
        return [
            f"{name}={value} has no effect with dbo='off': no step is split"
            for name, value in options.items()
            if value is not None
        ]

    def describe(self) -> str:
        """One line for the start-up block."""
        if self.dbo == "off":
            return "off: every step is serial"
        prefill, decode = self.threshold(decode_only=False), self.threshold(decode_only=True)
        limits = f"from {prefill} tokens a rank in prefill and {decode} in decode" if prefill or decode else "always"
        note = ", by fixed thresholds: no calibration exists yet" if self.dbo == "auto" else ""
        return f"{self.dbo}: {self.micro_batches} micro-batches, cut by {self.split}, {limits}{note}"
