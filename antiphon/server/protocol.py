"""The request bodies: the fields of OpenAI's API, and vLLM's extra parameters.

A field that is not listed here is refused by name. `null` means the same as leaving a field out. Ranges are checked by
`SamplingParams`, whose errors name the field.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    NonNegativeInt,
    PlainValidator,
    conlist,
    model_validator,
)
from pydantic_core import PydanticCustomError

from antiphon.core.errors import RequestError
from antiphon.core.sampling import SamplingParams
from antiphon.frontend.chat import joined_text


class Body(BaseModel):
    """A JSON object without unknown fields.

    ignored: fields that are accepted and have no effect.
    unsupported: fields that are refused, except with one of these values, which ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_idle_fields(cls, content: Any) -> dict[str, Any]:
        """Drop nulls, ignored fields, and unsupported fields that ask for nothing."""
        if not isinstance(content, dict):
            raise PydanticCustomError("not_an_object", "it is not a JSON object")
        wanted = {}
        for name, value in content.items():
            if name in cls.unsupported:
                idle_values = (None, *cls.unsupported[name])
                if not any(value == idle and type(value) is type(idle) for idle in idle_values):
                    raise PydanticCustomError("unsupported", "it is not supported", {"name": name})
            elif name not in cls.ignored and value is not None:
                wanted[name] = value
        return wanted


class StreamOptions(Body):
    ignored = frozenset({"include_obfuscation"})
    unsupported: ClassVar = {"continuous_usage_stats": (False,)}

    include_usage: bool = False


_IGNORED = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "request_id", "safety_identifier", "service_tier"}
    | {"store", "user"}
)
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    # OpenAI's
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    # vLLM's
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "priority": (0,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
}


class SamplingFields(Body):
    """The fields that completions and chats share. `None` means the default of `SamplingParams`."""

    ignored = _IGNORED

    model: str = ""
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    def sampling_params(self, **changes: Any) -> SamplingParams:
        """Raises `OptionError` for a value out of range."""
        return SamplingParams(**{name: getattr(self, name) for name in _SAMPLING} | changes)


_SAMPLING = {item.name for item in fields(SamplingParams)} & SamplingFields.model_fields.keys()

_TEXTS = conlist(str, min_length=1)
_TOKEN_IDS = conlist(NonNegativeInt, min_length=1)


def _checked_prompts(value: object) -> list[str | list[int]]:
    """The prompts as a list, even if there is only one."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _wrong_prompt("prompt is neither a string nor a list")
    kinds = {type(item) for item in value}
    if kinds == {int}:
        return [value]
    if kinds == {str}:
        return value
    if kinds == {list} and all({type(item) for item in one} <= {int} for one in value):
        return value
    raise _wrong_prompt("prompt mixes types")


def _wrong_prompt(fact: str) -> RequestError:
    return RequestError(fact, remedy="use a string, token ids, or a list of either", option="prompt")


class CompletionRequest(SamplingFields):
    unsupported = _UNSUPPORTED | {"suffix": ("",)}

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(
            _checked_prompts, json_schema_input_type=str | _TEXTS | _TOKEN_IDS | conlist(_TOKEN_IDS, min_length=1)
        ),
    ]
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool = True


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a chat. A reply can be sent back unchanged: its fields that ask for nothing are accepted.

    content: an assistant's may be missing, because it may have said nothing, or only reasoned.
    reasoning_content: what the assistant reasoned before this content; the template decides whether to use it.
    """

    ignored = frozenset({"name"})
    unsupported: ClassVar = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": ("",),
        "tool_calls": ([],),
        "tool_call_id": (),
    }

    role: Literal["system", "developer", "user", "assistant"]
    reasoning_content: str | None = None
    reasoning: str | None = None
    content: Annotated[
        str,
        PlainValidator(
            lambda content: joined_text(content), json_schema_input_type=str | conlist(TextPart, min_length=1)
        ),
    ]

    @model_validator(mode="before")
    @classmethod
    def _fill_in_content(cls, message: Any) -> Any:
        if isinstance(message, dict) and message.get("role") == "assistant" and message.get("content") is None:
            return message | {"content": ""}
        return message

    def for_template(self) -> dict[str, Any]:
        reasoning = self.reasoning_content or self.reasoning
        return {"role": self.role, "content": self.content} | ({"reasoning_content": reasoning} if reasoning else {})


_CHAT_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class ChatFields(Body):
    """The arguments of a chat template besides the messages, as in `LLM.chat_prompt`."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}  # pydantic copies it


class ChatRequest(SamplingFields, ChatFields):
    """include_reasoning: return the reasoning that the parser finds."""

    unsupported = _UNSUPPORTED | _CHAT_UNSUPPORTED

    messages: list[Message]
    include_reasoning: bool = True
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


class TokenizeRequest(ChatFields):
    """A text to tokenize, or the messages of a chat."""

    unsupported: ClassVar = {"chat_template": (), "tools": ([],)}

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str = ""
    tokens: Annotated[list[NonNegativeInt], FailFast()]
