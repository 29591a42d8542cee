"""`LLM`: the offline API. It tokenises, spreads requests over the ranks, and collects their texts."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch

from antiphon.config.engine_config import ResolvedConfig
from antiphon.config.keywords import OPTION_DEFAULTS, make_config
from antiphon.config.memory import check_memory
from antiphon.core.bundled import BUNDLED_MODEL
from antiphon.core.errors import OptionError, RequestError
from antiphon.core.sampling import GeneratedOutput, SamplingParams
from antiphon.engine.scheduling.request import Request
from antiphon.frontend.chat import Message
from antiphon.frontend.client import Client, InProcessClient
from antiphon.frontend.detokenizer import whole_characters
from antiphon.frontend.outputs import Collector
from antiphon.frontend.prompts import Prompt, RequestMaker, most_tokens, params_for, prompt_list
from antiphon.frontend.tokenizer import NoTokenizer, Tokenizer, with_end_token_of
from antiphon.frontend.worker_client import WorkerClient
from antiphon.timeline import StepTimeline

logger = logging.getLogger("antiphon")


@dataclass(slots=True, eq=False)
class _Open:
    """A request under way: one of the results for a prompt."""

    place: int  # of the prompt in the call
    rank: int
    request: Request
    collector: Collector


class LLM:
    """A model on one or more ranks.

    model: folder of a Hugging Face checkpoint, the id of one on the hub ("org/name"), or "tiny-deepseek", the one that
        is bundled. With dummy weights also the name of a published shape, such as "qwen3-30b-a3b"; a wrong one gives
        the list. revision: branch, tag or commit of a hub's model.
    load_format: "auto", or "dummy" for random weights: for measurements, with prompts of token ids and empty texts.
    num_layers: keep only so many layers. routing: of dummy weights, "model", "uniform", "zipf:A" or "recorded:FILE".
    ranks: processes that share the experts; they must divide the number of experts. With one rank no process is
        started. device: "cpu", "cuda" (one device a rank), or "auto": what the environment variable ANTIPHON_DEVICE
        says, else "cuda" if there are as many devices as ranks.
    dbo: dual-batch overlap, "auto", "on" or "off"; "auto" is off except on GPUs without peer access and over a
        simulated link, and `stats` says why. transport: "auto", "copy-engine" and "host-staged" (GPUs),
        "shared-memory" (CPUs), "allgather", "alltoall", "local", or others in docs/options.md. dtype: "auto" (bfloat16
        on GPUs, float32 on CPUs), "float32", "bfloat16", "float64". peer_access: whether GPUs may read each other's
        memory; the environment variable NCCL_P2P_DISABLE=1 forbids it too.
    split: where a batch is cut, "token" or "request-boundary". micro_batches: parts of a split step, 2 to 8.
    dbo_prefill_token_threshold, dbo_decode_token_threshold: tokens on the busiest rank from which a step is split;
        by default what "auto" chooses (4096 on GPUs without peer access, for both; 512 and 32 over a simulated link),
        and none under "on".
    imbalance_ratio: how far from the middle a request boundary may lie, as a share of the tokens. A step whose lanes
        together are longer than the serial step by more than twice this share is not split, under "on" either.
    min_total_tokens_to_split, min_prefill_tokens_to_split: a step with fewer tokens on the busiest rank, or with fewer
        tokens of prompts among them, is not split; they hold under "on" too. dbo_start_layer, dbo_end_layer: only these
        layers run split, the last one excluded.
    max_num_batched_tokens: tokens of one step on one rank. max_num_seqs: requests that run at once on one rank.
    max_model_len: longest text, prompt and output together. It and other counts of tokens, requests and bytes may be
        written as sizes, "32k" (docs/options.md).
    block_size: tokens in a KV block. kv_cache_memory: bytes of the KV cache of one rank; by default a fixed size on
        the CPU, and on a GPU what the share gpu_memory_utilization of its memory leaves beside the weights and the
        largest step, which is run once to measure it.
    prefix_caching: share full KV blocks between texts that begin alike, also with those that have ended.
    chunked_prefill: fill what is left of a step with a part of a prompt; without it only prompts that are longer than
        a whole step are cut.
    seed: from which requests without a seed take theirs, and dummy weights. timeout_s: longest wait for another
        process. debug_order: compare the collectives of all ranks before every step. on_start: called with what the
        engine is doing while it starts, such as "loading the model: 35% of 14.2 GB".
    Options of other engines are accepted where they mean something here (docs/options.md), or refused by name.

    Raises `OptionError` and `ModelError` (both `ValueError`) before anything is started, `EngineError` if a worker
    does not come up. Threads take turns: a call waits until that of another one has returned. Leaving the context,
    `close`, and the end of the process end all workers.

        with LLM(ranks=2, dbo="on") as llm:
            outputs = llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))
    """

    def __init__(
        self,
        model: str = BUNDLED_MODEL,
        *,
        revision: str | None = None,
        load_format: str = "auto",
        num_layers: int | None = None,
        routing: str = "model",
        ranks: int = 1,
        device: str = "auto",
        dbo: str = "auto",
        transport: str = "auto",
        peer_access: bool = True,
        dtype: str = "auto",
        split: str = "token",
        micro_batches: int = 2,
        dbo_prefill_token_threshold: int | str | None = None,
        dbo_decode_token_threshold: int | str | None = None,
        imbalance_ratio: float = 0.1,
        min_total_tokens_to_split: int | str = 0,
        min_prefill_tokens_to_split: int | str = 0,
        dbo_start_layer: int = 0,
        dbo_end_layer: int | None = None,
        max_num_batched_tokens: int | str | None = None,
        max_num_seqs: int | str = 256,
        max_model_len: int | str | None = None,
        block_size: int | str = 16,
        kv_cache_memory: int | str | None = None,
        gpu_memory_utilization: float = 0.9,
        prefix_caching: bool = True,
        chunked_prefill: bool = True,
        seed: int = 0,
        timeout_s: float = 120.0,
        debug_order: bool = False,
        on_start: Callable[[str], None] | None = None,
        **foreign: Any,
    ) -> None:
        given = locals()
        if on_start is not None and not callable(on_start):
            raise OptionError(
                f"on_start={on_start!r} is not callable; pass a function that takes a text, such as print"
            )
        self._turn = threading.RLock()  # `progress` may ask for statistics
        self._is_running = False
        options = make_config({name: given[name] for name in OPTION_DEFAULTS}, foreign)
        self.config: ResolvedConfig = options.resolve()
        options = self.config.options
        self._asked_policy = options.policy
        for sentence in self.config.checkpoint_notes:
            logger.warning(sentence)
        warned = self._warn(but_not=())
        check_memory(self.config)
        self._tokenizer = NoTokenizer() if options.load_format == "dummy" else Tokenizer(options.model)
        self.config = with_end_token_of(self._tokenizer, self.config)
        self._client: Client = (
            InProcessClient(self.config, on_start) if options.ranks == 1 else WorkerClient(self.config, on_start)
        )
        self._close = weakref.finalize(self, self._client.close)
        ready = self._client.ready
        self.config = self.config.started(
            device_name=ready.device_name,
            transport_name=ready.transport_name,
            data_path=ready.data_path,
            cache=ready.cache,
        )
        self._warn(but_not=warned)
        self._settled = self.config.settled_policy
        self._requests = RequestMaker(self.config, self._tokenizer)
        self._logits_dtype = torch.promote_types(self.config.dtype, torch.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. The object cannot be used afterwards; calling it again does nothing."""
        with self._turn:
            self._close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> list[GeneratedOutput]:
        """Continue every prompt; the results are in the order of the prompts.

        prompts: texts, or lists of token ids; one prompt alone is a list of one.
        sampling_params: one for all prompts, or one for each.
        progress: called with (prompts finished, prompts in all, tokens generated) after every step. A prompt has
            finished when all its n results have. It may ask for `stats`, and not call `generate`.
        Raises `RequestError` (a `ValueError`) before anything runs if a prompt cannot be served; the engine stays
        usable. Raises `EngineError` if a rank fails; the engine has ended then.
        """
        texts = prompt_list(prompts)
        if progress is not None and not callable(progress):
            raise RequestError(f"progress is a {type(progress).__name__}; pass a function of three numbers, or None")
        with self._turn:
            opened = self._open(self._requests.make(texts, params_for(texts, sampling_params)))
            self._run(opened, len(texts), progress)
        results: list[list[_Open]] = [[] for _ in texts]
        for one in opened.values():
            results[one.place].append(one)
        return [self._output(text, ones) for text, ones in zip(texts, results, strict=True)]

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a chat, ready for the assistant's answer: `[{"role": "user", "content": "..."}]`.

        messages: contents are texts, or lists of parts of type text, which are joined.
        add_generation_prompt: whether the template begins an answer; by default unless the last message goes on.
        continue_final_message: leave the last message open, so that the output continues it.
        chat_template_kwargs: variables of the checkpoint's template, such as `{"enable_thinking": False}`.
        Raises `RequestError` for messages and settings that the template does not take, `ModelError` if the checkpoint
        has none.
        """
        return self._tokenizer.chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=chat_template_kwargs,
        )

    def reconfigure(self, *, dbo: str | None = None, split: str | None = None) -> None:
        """Change `dbo` or `split` of all ranks between two calls of `generate`, without loading the model again."""
        with self._turn:
            asked = self._asked_policy
            asked = replace(asked, dbo=dbo or asked.dbo, split=split or asked.split)
            settled = self.config.settle(asked)
            self._client.reconfigure(settled.policy)
            self._asked_policy, self._settled = asked, settled

    def stats(self) -> dict[str, Any]:
        """Counts since the start.

        `steps`, `steps_by_plan` (plan -> steps), `serial_reasons` (reason -> steps), which are the same on all ranks;
        `overlap` (plan -> seconds of rank 0: `time_s`, `communication_s`, `hidden_s`, `exposed_s`, and `num_bytes`; on
        GPUs, where the host only queues and sees no arrival, the middle three are `None`);
        `last_plan`, in words and with its numbers; `kv_cache` (tokens of a rank, and where the size comes from);
        summed over ranks: `kv_blocks`, `unfinished` and `running` requests, `preemptions`, `prefix_cache` (tokens of
        texts that were admitted, and how many of them were found, once more after a preemption); and `ranks`,
        `device`, `transport`, `dbo`, and `dbo_reason` (what "auto" chose and why).
        """
        with self._turn:
            by_rank = self._client.statistics()
        first = by_rank[0]
        blocks = {name: sum(rank["kv_blocks"][name] for rank in by_rank) for name in ("total", "free")}
        return {
            "steps": first["steps"],
            "steps_by_plan": first["steps_by_plan"],
            "serial_reasons": first["serial_reasons"],
            "overlap": first["overlap"],
            "kv_blocks": {**blocks, "block_size": first["kv_blocks"]["block_size"]},
            "unfinished": sum(rank["unfinished"] for rank in by_rank),
            "running": sum(rank["running"] for rank in by_rank),
            "preemptions": sum(rank["preemptions"] for rank in by_rank),
            "prefix_cache": {
                name: sum(rank["prefix_cache"][name] for rank in by_rank) for name in first["prefix_cache"]
            },
            "kv_cache": self.config.cache_facts(),
            "ranks": self.config.options.ranks,
            "device": self.config.device_name,
            "transport": str(self.config.transport),
            "dbo": self._settled.policy.dbo,
            "dbo_reason": self._settled.reason,
            "last_plan": first["last_plan"],
        }

    def timelines(self) -> list[list[StepTimeline]]:
        """The last steps of every rank with all their events, oldest first; times are the host's (`StepTimeline`)."""
        with self._turn:
            return self._client.timelines()

    def _warn(self, *, but_not: Sequence[str]) -> list[str]:
        """Say which options change nothing, but for what was said before; what `auto` is is known late."""
        sentences = self.config.without_effect()
        for sentence in sentences:
            if sentence not in but_not:
                logger.warning(sentence)
        return sentences

    # ---- requests

    def _run(
        self, opened: dict[int, _Open], num_prompts: int, progress: Callable[[int, int, int], None] | None
    ) -> None:
        """Until all have finished; after an error none of them is left on a rank."""
        if self._is_running:
            raise RequestError("generate was called by its own progress function; call it when it has returned")
        by_rank: list[list[Request]] = [[] for _ in range(self.config.options.ranks)]
        for one in opened.values():
            by_rank[one.rank].append(one.request)
        num_open = Counter(one.place for one in opened.values())
        num_tokens = 0
        self._is_running = True
        try:
            self._client.submit(by_rank)
            while num_open:
                to_cancel = []
                for output in self._client.poll():
                    item = opened.get(output.request_id)
                    if item is None or item.collector.finished:
                        continue
                    delta = item.collector.take(output)
                    num_tokens += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        num_open -= Counter([item.place])
                    if item.collector.must_cancel:
                        to_cancel.append(output.request_id)
                if to_cancel:
                    self._client.cancel(to_cancel)
                if progress is not None:
                    progress(num_prompts - len(num_open), num_prompts, num_tokens)
        except BaseException:
            self._client.abort([number for number, one in opened.items() if not one.collector.finished])
            raise
        finally:
            self._is_running = False

    def _open(self, made: list[list[Request]]) -> dict[int, _Open]:
        """By request id. Each goes to the rank that has the fewest tokens to come."""
        load = [0] * self.config.options.ranks
        opened = {}
        for place, requests in enumerate(made):
            for request in requests:
                rank = load.index(min(load))
                load[rank] += most_tokens(request)
                collector = Collector(self._tokenizer, request, logits_dtype=self._logits_dtype, streaming=False)
                opened[request.request_id] = _Open(place, rank, request, collector)
        return opened

    def _output(self, prompt: Prompt, results: list[_Open]) -> GeneratedOutput:
        first = results[0]
        prompt_ids = list(first.request.prompt_ids)
        skips = first.request.params.skip_special_tokens
        text = prompt if isinstance(prompt, str) else whole_characters(self._tokenizer, prompt_ids, skip_special=skips)
        return GeneratedOutput(
            prompt=text,
            prompt_token_ids=prompt_ids,
            outputs=[one.collector.completion(index) for index, one in enumerate(results)],
            prompt_logits=first.collector.prompt_logits(),
            prompt_logprobs=first.collector.prompt_logprobs(),
            num_cached_tokens=first.collector.num_cached,
        )
