"""How a request is sampled, and what comes back.

Names and meanings are those that users of vLLM and of OpenAI's API know. One thing differs: a value out of range is
always an error, never corrected in silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch

from antiphon.core.errors import OptionError, is_number, is_whole, out_of_range, unicode_fault

_MOST_N = 128
_MOST_LOGPROBS = 20
_MOST_STOPS = 16
_LONGEST_STOP = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request.

    The logits of a token go through, in this order: logit_bias; min_tokens; the penalties; temperature; top_k; top_p;
    min_p. What is left is drawn by its probability.

    n: results for one prompt, at most 128. The first equals that of n=1; the others have seeds derived from its seed.
    max_tokens: maximum number of tokens to generate, at least 1; `None` for as many as the model's length allows.
    min_tokens: minimum number of tokens before an end: until then the end-of-sequence token and stop_token_ids cannot
        be chosen, and stop strings do not count.
    temperature, top_k, top_p, min_p and repetition_penalty: `None` takes what the model's generation_config.json says,
        else temperature 1 and no limit (`resolve`); the same offline, on the command line and in the server.
    temperature: 0 is greedy; above it, logits are divided by it before sampling.
    top_k: sample among the k likeliest tokens; 0 or -1 means all. Of equal ones those with lower ids are kept.
    top_p: sample among the likeliest tokens that together reach this probability, in (0, 1].
    min_p: sample among tokens at least min_p times as likely as the likeliest, in [0, 1].
    presence_penalty: subtracted from the logits of tokens that already appear in the output, -2 to 2.
        frequency_penalty: the same, multiplied by how often they appear. repetition_penalty: the logits of tokens in
        the prompt or the output are divided by it where they are positive, else multiplied; 0.01 to 100, 1 for none.
    logit_bias: token id -> what is added to its logit, -100 to 100.
    seed: the same seed gives the same tokens whatever else is in the batch; `None` takes one from the engine.
    stop: a text, or at most 16 of at most 256 characters each (they are looked for after every token), that ends the
        output when it appears; of several the one that is complete first. The text is cut before it, but token_ids
        keep the tokens that made it. The text of a special token, such as "<|user|>", ends it where that token comes.
        include_stop_str_in_output: do not cut it off, nor a token of stop_token_ids.
    stop_token_ids: tokens that end the output like the end-of-sequence token.
    ignore_eos: go on past the end-of-sequence token.
    skip_special_tokens: leave special tokens, such as "<|user|>", out of the text.
    logprobs: return the logprob of every token and those of this many of the likeliest tokens, 0 to 20. They are the
        model's own (log-softmax of its logits in float32), before anything above changes them. prompt_logprobs: the
        same for the tokens of the prompt; the first has none.
    return_logits: keep the logits behind every generated token (float32, or float64 in a float64 engine).
    return_prompt_logits: keep the logits at every position of the prompt. Both are large; they are for checking.

    `stop` and `stop_token_ids` are kept as tuples. Raises `OptionError` for a value out of range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_logits: bool = False
    return_prompt_logits: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _LIMITS:
                if value is not None or "None" not in str(item.type):
                    _check_number(item.name, value)
            elif item.type == "bool" and not isinstance(value, bool):
                raise OptionError(
                    f"{item.name}={value!r} is not True or False", remedy="use one", option=item.name, value=value
                )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise OptionError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}",
                remedy="lower it or raise max_tokens",
                option="min_tokens",
                value=self.min_tokens,
            )
        object.__setattr__(self, "stop", _checked_stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    def resolve(self, defaults: Mapping[str, float]) -> ResolvedParams:
        """Fill in what was left open from `defaults`, else from `NEUTRAL_SAMPLING`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        open_names = [name for name in NEUTRAL_SAMPLING if values[name] is None]
        return ResolvedParams(**values | {name: defaults.get(name, NEUTRAL_SAMPLING[name]) for name in open_names})

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return self.stop or ()  # type: ignore[return-value]  # __post_init__ has made it one

    @property
    def wants_prompt(self) -> bool:
        """Whether logits or logprobs of the prompt are wanted, so that every token of it must be computed."""
        return self.prompt_logprobs is not None or self.return_prompt_logits


NEUTRAL_SAMPLING: Mapping[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""The model's own distribution: what holds where neither the caller nor generation_config.json says anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedParams(SamplingParams):
    """Parameters with nothing left open, as the engine takes them."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


_LIMITS: dict[str, tuple[float, float, bool, str]] = {
    "n": (1, _MOST_N, True, f"an integer from 1 to {_MOST_N}"),
    "max_tokens": (1, math.inf, True, "an integer of at least 1, or None for as many as there is room for"),
    "min_tokens": (0, math.inf, True, "an integer of at least 0"),
    "temperature": (0.0, 100.0, False, "a number from 0 (greedy) to 100"),
    "top_k": (-1, math.inf, True, "an integer of at least 1, or 0 or -1 for all tokens"),
    "top_p": (math.ulp(0.0), 1.0, False, "a number above 0 and at most 1"),
    "min_p": (0.0, 1.0, False, "a number from 0 (all tokens) to 1"),
    "presence_penalty": (-2.0, 2.0, False, "a number from -2 to 2 (0: none)"),
    "frequency_penalty": (-2.0, 2.0, False, "a number from -2 to 2 (0: none)"),
    "repetition_penalty": (0.01, 100.0, False, "a number from 0.01 to 100 (1: none)"),
    "seed": (0, 2**63 - 1, True, "an integer from 0 to 2**63 - 1, or None to take one from the engine"),
    "logprobs": (
        0,
        _MOST_LOGPROBS,
        True,
        f"an integer from 0 to {_MOST_LOGPROBS}, or None; return_logits gives the logits of all tokens",
    ),
    "prompt_logprobs": (
        0,
        _MOST_LOGPROBS,
        True,
        f"an integer from 0 to {_MOST_LOGPROBS}, or None; return_prompt_logits gives the logits of all tokens",
    ),
}


def _check_number(name: str, value: object) -> None:
    low, high, whole, text = _LIMITS[name]
    right_type = is_whole(value) if whole else is_number(value)
    if not right_type or not low <= value <= high:  # type: ignore[operator]
        raise out_of_range(name, value, text)


def _checked_stops(stop: object) -> tuple[str, ...] | None:
    if stop is None or isinstance(stop, str):
        stops: list[object] = [] if stop is None else [stop]
    elif isinstance(stop, Sequence) and not isinstance(stop, bytes):
        stops = list(stop)
    else:
        raise _wrong_type("stop", stop, "use a text, a list of texts, or None")
    if len(stops) > _MOST_STOPS:
        limit = f"at most {_MOST_STOPS} are looked for after every token"
        raise OptionError(f"stop has {len(stops)} texts", limit=limit, remedy="use fewer", option="stop", value=stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            fact = f"stop has {text!r}, which is no text to look for"
            raise OptionError(fact, remedy="use texts of at least one character", option="stop", value=text)
        if fault := unicode_fault(text):
            fact = f"stop has {text!r}, which is not valid Unicode text"
            raise OptionError(fact, limit=fault, remedy="repair it", option="stop", value=text)
        if len(text) > _LONGEST_STOP:
            fact = f"stop has a text of {len(text)} characters"
            limit = f"at most {_LONGEST_STOP} are looked for after every token"
            raise OptionError(fact, limit=limit, remedy="use its beginning", option="stop", value=text)
    return tuple(str(text) for text in stops) or None


def _checked_ids(ids: object) -> tuple[int, ...] | None:
    if ids is None:
        return None
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes):
        raise _wrong_type("stop_token_ids", ids, "use a list of token ids, or None")
    found = list(ids)
    for token_id in found:
        if not is_whole(token_id) or token_id < 0:
            fact = f"stop_token_ids has {token_id!r}, which is no token id"
            raise OptionError(fact, remedy="use integers of at least 0", option="stop_token_ids", value=token_id)
    return tuple(found) or None


def _checked_bias(bias: object) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise _wrong_type("logit_bias", bias, "use a dict of token ids and numbers from -100 to 100")
    checked: dict[int, float] = {}
    for key, value in bias.items():
        # JSON has only such keys; int refuses thousands of digits with an error of its own.
        token_id = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key
        if not is_whole(token_id) or token_id < 0:
            fact = f"logit_bias has {key!r:.40}, which is no token id"
            raise OptionError(fact, remedy="use integers of at least 0", option="logit_bias", value=key)
        if not is_number(value) or not -100 <= value <= 100:
            fact = f"logit_bias has {value!r} for token {key}"
            raise OptionError(fact, remedy="use numbers from -100 to 100", option="logit_bias", value=value)
        checked[token_id] = float(value)
    return checked or None


def _wrong_type(option: str, value: object, remedy: str) -> OptionError:
    return OptionError(f"{option}={value!r} is a {type(value).__name__}", remedy=remedy, option=option, value=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """The log probability of one token at one position. `rank` is 1 for the likeliest; ties share a rank."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of the results for a prompt, owned by the caller.

    `finish_reason` is `"stop"` or `"length"`. `stop_reason` is the stop string or the token of stop_token_ids that
    ended it, `None` for the end-of-sequence token and `"length"`. The token that ended it is the last of `token_ids`.
    `logprobs` has for each token a dict with it and the likeliest ones, by token id; `cumulative_logprob` is the sum
    over `token_ids`. `logits` [len(token_ids), V] are on the CPU. All three are `None` if not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    logits: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The results of one prompt, owned by the caller; `outputs` has n of them.

    `text`, `token_ids`, `finish_reason` and `logits` are those of the first. `prompt_logits` [len(prompt_token_ids), V]
    are on the CPU, and `prompt_logprobs` begin with `None`, if asked for. `num_cached_tokens` of the prompt were taken
    from the prefix cache.
    """

    prompt: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logits: torch.Tensor | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def logits(self) -> torch.Tensor | None:
        return self.outputs[0].logits


GeneratedOutput = RequestOutput
"""The former name of `RequestOutput`."""
