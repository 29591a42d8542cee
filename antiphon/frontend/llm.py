"""`LLM` is the offline API. It tokenizes prompts, spreads requests over the ranks, and collects their texts."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from antiphon.config.engine_config import ResolvedConfig
from antiphon.config.keywords import make_config, shows_options
from antiphon.core.bundled import BUNDLED_MODEL
from antiphon.core.errors import OptionError, RequestError
from antiphon.core.sampling import RequestOutput, SamplingParams
from antiphon.frontend.chat import Message
from antiphon.frontend.client import Client, InProcessClient
from antiphon.frontend.core import Core, Placed
from antiphon.frontend.detokenizer import whole_characters
from antiphon.frontend.prompts import Prompt, params_for, prompt_list
from antiphon.frontend.stats import EngineStats
from antiphon.frontend.worker_client import WorkerClient
from antiphon.launch import Launcher
from antiphon.timeline import StepTimeline


class LLM:
    """A model on one or more ranks.

    Options are keyword arguments: `__init__` lists them, and docs/options.md explains them. Counts of tokens, requests
    and bytes may be written as sizes, such as "32k". Options of other engines are accepted where they have a meaning
    here (docs/options.md), or refused by name.
    on_start: called with what the engine is doing while it starts, such as "loading the model: 35% of 14.2 GB".
    launcher: starts every rank, even a single one, in a process (`antiphon.launch`); `None` starts them on this host.

    Raises `OptionError` and `ModelError` (both `ValueError`) before anything is started, `EngineError` if a worker
    fails to start. Threads take turns: a call waits until the call of another thread has returned. All workers end when
    the context is left, by `close`, or with the process.

        with LLM(ranks=2, dbo="on") as llm:
            outputs = llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))
    """

    @shows_options
    def __init__(
        self,
        model: str = BUNDLED_MODEL,
        *,
        on_start: Callable[[str], None] | None = None,
        launcher: Launcher | None = None,
        **options: Any,
    ) -> None:
        if on_start is not None and not callable(on_start):
            raise OptionError(
                f"on_start={on_start!r} is not callable",
                remedy="pass a function that takes a text, such as print",
                option="on_start",
                value=on_start,
            )
        if launcher is not None and not isinstance(launcher, Launcher):
            raise OptionError(
                f"launcher={launcher!r} is not a Launcher",
                remedy="pass an instance of a subclass of antiphon.launch.Launcher, or None",
                option="launcher",
                value=launcher,
            )
        self._turn = threading.RLock()  # `progress` may ask for statistics
        self._is_running = False
        self._core = Core(make_config({"model": model, **options}))
        config = self._core.config
        self._client: Client
        if config.options.ranks == 1 and launcher is None:
            self._client = InProcessClient(config, on_start)
        else:
            self._client = WorkerClient(config, on_start, launcher=launcher)
        self._close = weakref.finalize(self, self._client.close)
        self._core.started(self._client.ready)

    @property
    def config(self) -> ResolvedConfig:
        """The options of this engine, with every `auto` resolved."""
        return self._core.config

    def __repr__(self) -> str:
        config = self.config
        model, where = config.options.model, config.device_name or config.device_kind
        dbo = self._core.policy.policy.dbo
        return f"LLM({model!r}, ranks={config.options.ranks}, {where}, {config.transport}, dbo={dbo!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop all workers. The object cannot be used afterwards; calling `close` again does nothing."""
        with self._turn:
            self._close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt. The results are in the order of the prompts.

        prompts: texts, lists of token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; or a single one of these.
        sampling_params: one for all prompts, or one for each.
        progress: called with (prompts finished, prompts in all, tokens generated) after every step. A prompt is
            finished when all its n results are. It may call `stats`, but not `generate`.
        Raises `RequestError` (a `ValueError`) before anything runs if a prompt cannot be served; the engine stays
        usable. Raises `EngineError` if a rank fails; then the engine has ended.
        """
        texts = prompt_list(prompts)
        if progress is not None and not callable(progress):
            raise RequestError(
                f"progress is a {type(progress).__name__}",
                remedy="pass a function of three numbers, or None",
                option="progress",
                value=progress,
            )
        with self._turn:
            if self._is_running:
                raise RequestError(
                    "generate was called from its own progress function", remedy="call it after generate has returned"
                )
            placed = self._core.place(texts, params_for(texts, sampling_params), streaming=False)
            self._run(placed, progress)
        return [self._output(text, results) for text, results in zip(texts, placed, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer a chat, or each of several chats. The results are in the order of the chats.

        messages: `[{"role": "user", "content": "..."}]`, or a list of such lists. The other parameters and the errors
        are those of `chat_prompt` and `generate`.
        """
        one = not isinstance(messages, Sequence) or not messages or isinstance(messages[0], Mapping)
        chats = [messages] if one else messages
        prompts = [
            self.chat_prompt(
                chat,  # type: ignore[arg-type]  # the type of the first item decides
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            )
            for chat in chats
        ]
        return self.generate(prompts, sampling_params, progress=progress)

    def get_tokenizer(self) -> Any:
        """Return the transformers tokenizer of this engine. Raises `ModelError` with dummy weights."""
        return self._core.tokenizer.of_transformers()

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a chat, ready for the assistant's answer.

        messages: `[{"role": "user", "content": "..."}]`. A content is a text, or a list of text parts to be joined.
        add_generation_prompt: append the beginning of an answer; by default yes, unless the last message is continued.
        continue_final_message: leave the last message open, so that the output continues it.
        chat_template_kwargs: variables of the checkpoint's template, such as `{"enable_thinking": False}`.
        Raises `RequestError` for messages or settings that the template refuses, `ModelError` if the checkpoint has no
        template.
        """
        return self._core.tokenizer.chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=chat_template_kwargs,
        )

    def reconfigure(self, *, dbo: str | None = None, split: str | None = None) -> None:
        """Change `dbo` or `split` on all ranks between two calls of `generate`, without reloading the model."""
        with self._turn:
            policy = self._core.resolve_policy(dbo=dbo, split=split)
            self._client.reconfigure(policy.policy)
            self._core.reconfigured(policy, dbo=dbo, split=split)

    def stats(self) -> EngineStats:
        """Return the counts since the start."""
        with self._turn:
            by_rank = self._client.statistics()
        return EngineStats.of(self.config, self._core.policy, by_rank)

    def timelines(self) -> list[list[StepTimeline]]:
        """Return the last steps of every rank with all their events, oldest first, in host time (`StepTimeline`)."""
        with self._turn:
            return self._client.timelines()

    # ---- requests

    def _run(self, placed: list[list[Placed]], progress: Callable[[int, int, int], None] | None) -> None:
        """Run until all results have finished. After an error none of them is left on a rank."""
        by_id = {one.request.request_id: (place, one) for place, ones in enumerate(placed) for one in ones}
        num_open = Counter(place for place, _ in by_id.values())
        num_tokens = 0
        self._is_running = True
        try:
            self._client.submit(self._core.by_rank(one for _, one in by_id.values()))
            while num_open:
                to_cancel = []
                for output in self._client.poll():
                    place, one = by_id.get(output.request_id, (0, None))
                    if one is None or one.collector.finished:
                        continue
                    delta = one.collector.take(output)
                    num_tokens += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        num_open -= Counter([place])
                    if one.collector.must_cancel:
                        to_cancel.append(output.request_id)
                if to_cancel:
                    self._client.cancel(to_cancel)
                if progress is not None:
                    progress(len(placed) - len(num_open), len(placed), num_tokens)
        except BaseException:
            self._client.abort([number for number, (_, one) in by_id.items() if not one.collector.finished])
            raise
        finally:
            self._is_running = False
            self._core.forget(by_id)

    def _output(self, prompt: str | Sequence[int], results: list[Placed]) -> RequestOutput:
        first = results[0]
        prompt_ids = list(first.request.prompt_ids)
        text = prompt
        if not isinstance(text, str):
            skip_special = first.request.params.skip_special_tokens
            text = whole_characters(self._core.tokenizer, prompt_ids, skip_special=skip_special)
        return RequestOutput(
            prompt=text,
            prompt_token_ids=prompt_ids,
            outputs=[one.collector.completion(index) for index, one in enumerate(results)],
            prompt_logits=first.collector.prompt_logits(),
            prompt_logprobs=first.collector.prompt_logprobs(),
            num_cached_tokens=first.collector.num_cached,
        )
