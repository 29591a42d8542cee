"""The checkpoint's tokenizer, and a stand-in for it with dummy weights."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from antiphon.config.engine_config import ResolvedConfig
from antiphon.core.errors import AntiphonError, ModelError, RequestError, first_line
from antiphon.core.warn_once import warn_once
from antiphon.frontend.chat import Message, chat_messages
from antiphon.frontend.token_bytes import bytes_reader

logger = logging.getLogger("antiphon.engine")

_WHOLE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_NEVER = {"local_files_only": True, "trust_remote_code": False}
"""Passed to every call that loads files: download nothing, and execute nothing of the checkpoint."""


class Tokenizer:
    """Converts text to token ids and back. Reads only the checkpoint's folder, and executes nothing in it.

    has_text: whether tokens have text. special_ids: tokens that `decode` skips by default.
    eos_token_id: the end-of-sequence token in the tokenizer's own files; `None` if they name none.
    """

    has_text = True

    def __init__(self, folder: str) -> None:
        self._tokenizer: Any = _load_tokenizer(Path(folder))
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        try:
            self._decode = _plain_decode(self._tokenizer)
            self._anchor, self._num_anchor_chars = self._find_anchor()
            self._read_bytes = bytes_reader(backend)
        except Exception as error:
            raise ModelError(
                f"the tokenizer in {folder} can be loaded but not used",
                limit=first_line(error),
                remedy="download it again, or upgrade tokenizers and transformers",
                option="model",
                value=folder,
            ) from error
        added = self._tokenizer.added_tokens_decoder
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.eos_token_id: int | None = self._tokenizer.eos_token_id
        self._token_texts: dict[int, str] = {}
        self._special_texts: dict[str, int] | None = None

    def of_transformers(self) -> Any:
        """Return the tokenizer object of transformers."""
        return self._tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Convert a text to token ids, by default with the special tokens that the checkpoint puts in front."""
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def decode(self, token_ids: Sequence[int], *, continues: bool = False, skip_special: bool = True) -> str:
        """Convert token ids to text. skip_special: leave special tokens out.

        continues: whether text precedes the tokens. Some tokenizers drop a space at the start of a text.
        """
        if continues and self._anchor:
            ids = [*self._anchor, *token_ids]
            return self._decode(ids, skip_special_tokens=skip_special)[self._num_anchor_chars :]
        return self._decode(token_ids, skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """Return the text of a token, special or not, inside a text. A part of a character is "\ufffd"."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self.decode([token_id], continues=True, skip_special=False)
            self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text, even if they are only a part of a character."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        found = None if token is None else self._read_bytes(token)
        return self.token_text(token_id).encode() if found is None else found

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token with this text, if there is one."""
        if self._special_texts is None:
            self._special_texts = {self.token_text(token_id): token_id for token_id in sorted(self.special_ids)}
        return self._special_texts.get(text)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Format a chat by the checkpoint's template, and return its token ids.

        add_generation_prompt: append the beginning of an answer; by default yes, unless the last message is continued.
        continue_final_message: leave the last message open, so that the output continues it.
        template_kwargs: variables of the template, such as `{"enable_thinking": False}`.
        Raises `RequestError` for messages or settings that the template refuses, `ModelError` if there is no template.
        """
        if not self._tokenizer.chat_template:
            raise ModelError(
                "this checkpoint has no chat template",
                remedy="use a prompt instead, or put a chat_template.jinja into a copy of its folder",
                option="model",
            )
        _check_flags(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        variables = self._template_variables({} if template_kwargs is None else template_kwargs)
        try:
            text = self._tokenizer.apply_chat_template(
                chat_messages(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
            return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except AntiphonError:
            raise
        except Exception as error:  # a template is a program and can raise anything
            raise RequestError(
                "the model's chat template refuses these messages",
                limit=first_line(error),
                remedy="change them or chat_template_kwargs",
                option="messages",
            ) from error

    def _template_variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Raise `RequestError` for settings of transformers and for special tokens, which callers must not set."""
        if not isinstance(given, Mapping):
            raise RequestError(
                f"chat_template_kwargs is a {type(given).__name__}",
                remedy='use a dict such as {"enable_thinking": False}',
                option="chat_template_kwargs",
                value=given,
            )
        taken = _template_settings(self._tokenizer) if given else frozenset()
        for name in given:
            if name in taken or name in self._tokenizer.special_tokens_map:
                raise RequestError(
                    f"chat_template_kwargs has {name!r}, which only the tokenizer may set",
                    remedy="leave it out",
                    option="chat_template_kwargs",
                    value=name,
                )
        return dict(given)

    def _find_anchor(self) -> tuple[list[int], int]:
        """Find a token to put in front of others, so that they are decoded inside a text, and the length of its text.

        Tokenizers that drop a space at the start of a text (SentencePiece and its imitations: Llama, Mixtral) need it.
        Others get no token.
        """
        ids = self.encode("a a", add_special_tokens=False)
        if self.decode(ids) == "".join(self.decode([token_id]) for token_id in ids):
            return [], 0
        return ids[-1:], len(self.decode(ids[-1:]))


def _check_flags(*, add_generation_prompt: bool | None, continue_final_message: bool) -> None:
    """Raise `RequestError` for values that are not True or False, and for two flags that exclude each other."""
    flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    for name, value in flags.items():
        if not isinstance(value, bool) and (value is not None or name == "continue_final_message"):
            raise RequestError(f"{name}={value!r} is not True or False", remedy="use one", option=name, value=value)
    if add_generation_prompt and continue_final_message:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            limit="the output either continues the last message or begins an answer",
            remedy="set one of them",
            option="continue_final_message",
            value=True,
        )


def _template_settings(tokenizer: Any) -> frozenset[str]:
    """The names of transformers' own settings, such as another template, which a request must not change."""
    settings = signature(tokenizer.apply_chat_template).parameters.values()
    names = {setting.name for setting in settings if setting.kind is not Parameter.VAR_KEYWORD}
    return frozenset(names | {"messages", "conversations"})


def _plain_decode(tokenizer: Any) -> Callable[..., str]:
    """Return the `decode` of the Rust tokenizer, which avoids the overhead of transformers' wrapper on every token.

    A wrapper that does more than call the Rust tokenizer is kept.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        warn_once(
            f"the tokenizer of this checkpoint ({type(tokenizer).__name__}) runs in Python",
            cost="texts are encoded and decoded several times slower",
            remedy="use a checkpoint that has a tokenizer.json",
        )
    own = [getattr(type(tokenizer), name, None) for name in ("decode", "_decode")]
    is_plain = all(getattr(method, "__module__", "").startswith("transformers.tokenization_utils") for method in own)
    found = backend if backend is not None and is_plain and not tokenizer.clean_up_tokenization_spaces else tokenizer
    return found.decode  # type: ignore[no-any-return]


class NoTokenizer:
    """The stand-in for a tokenizer with dummy weights: prompts are token ids, and every text is empty."""

    has_text = False
    special_ids: frozenset[int] = frozenset()
    eos_token_id: int | None = None

    def of_transformers(self) -> Any:
        raise ModelError("there is no tokenizer with dummy weights", remedy="use a checkpoint with its tokenizer")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise RequestError("there is no tokenizer with dummy weights", remedy="pass token ids", option="prompts")

    def decode(self, token_ids: Sequence[int], *, continues: bool = False, skip_special: bool = True) -> str:
        return ""

    def token_text(self, token_id: int) -> str:
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        return b""

    def special_id(self, text: str) -> int | None:
        return None

    def chat(self, messages: Sequence[Message], **_settings: Any) -> list[int]:
        return self.encode("")


def with_end_token_of(tokenizer: Tokenizer | NoTokenizer, config: ResolvedConfig) -> ResolvedConfig:
    """Add the tokenizer's end-of-sequence token to the configuration, and warn if they disagree."""
    named, token_id = config.model.eos_token_ids, tokenizer.eos_token_id
    if token_id is None or token_id in named or not 0 <= token_id < config.model.vocab_size:
        if not named and tokenizer.has_text:
            logger.warning(
                "%s names no end-of-sequence token: outputs end only by max_tokens, stop strings or stop_token_ids",
                config.options.model,
            )
        return config
    if named:
        logger.warning(
            "the tokenizer of %s ends texts with token %d (%s), its config files with %s; each of them ends an output",
            config.options.model,
            token_id,
            tokenizer.token_text(token_id),
            list(named),
        )
    return config.with_end_tokens((*named, token_id))


def _load_tokenizer(folder: Path) -> Any:
    """Load the transformers tokenizer of a folder. Raises `ModelError` if that fails, or would execute its code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds, and only the frontend needs it

    is_whole = (folder / _WHOLE).exists()
    try:
        # AutoTokenizer converts other formats with classes of transformers.
        kind = PreTrainedTokenizerFast if is_whole else AutoTokenizer
        return kind.from_pretrained(str(folder), **_NEVER)
    except Exception as error:  # tokenizers has no narrower class for an unknown format
        if not is_whole and (code := _custom_code(folder)):
            raise ModelError(
                f"the tokenizer in {folder} has no {_WHOLE}, only code ({code})",
                limit="code of a checkpoint is never executed",
                remedy=f"if you trust that code, make a {_WHOLE} with it elsewhere and put it into the folder: "
                "AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True).save_pretrained(FOLDER)",
                option="model",
                value=str(folder),
            ) from error
        with_file = "" if is_whole else f" with its {_WHOLE}"
        raise ModelError(
            f"the tokenizer in {folder} cannot be loaded",
            limit=first_line(error),
            remedy=f"download it again{with_file}, or upgrade tokenizers and transformers",
            option="model",
            value=str(folder),
        ) from error


def _custom_code(folder: Path) -> str:
    """The classes in the checkpoint's code that should load its tokenizer; "" if none."""
    try:
        auto_map = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("auto_map", {})
    except (OSError, ValueError, AttributeError):
        return ""
    classes = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    names = [name for name in (classes if isinstance(classes, list) else [classes]) if isinstance(name, str)]
    return ", ".join(names)
