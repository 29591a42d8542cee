"""`LLM`: the offline API. It tokenises, spreads requests over the ranks, and collects their texts."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import torch

from antiphon.core.bundled import BUNDLED_MODEL
from antiphon.core.checks import is_whole
from antiphon.core.errors import RequestError
from antiphon.core.sampling import CompletionOutput, GeneratedOutput, SamplingParams
from antiphon.engine.client import Client, InProcessClient
from antiphon.engine.config import ResolvedConfig
from antiphon.engine.options import OPTION_DEFAULTS, make_config
from antiphon.engine.prompts import Prompt, params_for, plain_ints, prompt_list
from antiphon.engine.request import Request, TokenOutput
from antiphon.engine.settle import settle_policy
from antiphon.engine.tokenizer import NoTokenizer, Tokenizer
from antiphon.engine.worker_client import WorkerClient
from antiphon.timeline import StepTimeline

__all__ = ["LLM"]

logger = logging.getLogger("antiphon")


@dataclass(slots=True, eq=False)
class _Open:
    """A request under way."""

    place: int  # among the prompts of the call
    request: Request
    prompt: str
    rank: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    logits: list[bytes] = field(default_factory=list)
    prompt_logits: list[bytes] = field(default_factory=list)


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
    dbo: dual-batch overlap, "auto", "on" or "off". transport: "auto", "copy-engine" and "host-staged" (GPUs),
        "shared-memory" (CPUs), "allgather", "alltoall", "local", or others in docs/offline.md. dtype: "auto" (bfloat16
        on GPUs, float32 on CPUs), "float32", "bfloat16", "float64". peer_access: whether GPUs may read each other's
        memory; the environment variable NCCL_P2P_DISABLE=1 forbids it too.
    split: where a batch is cut, "token" or "request-boundary". micro_batches: parts of a split step, 2 to 8.
    dbo_prefill_token_threshold, dbo_decode_token_threshold: tokens on the busiest rank from which a step is split;
        by default 512 and 32 under "auto" (on GPUs 4096, with peer access 8192, for both) and none under "on".
    imbalance_ratio: how far from the middle a request boundary may lie, as a share of the tokens.
    min_total_tokens_to_split, min_prefill_tokens_to_split: a step with fewer tokens on the busiest rank, or with fewer
        tokens of prompts among them, is not split; they hold under "on" too. dbo_start_layer, dbo_end_layer: only these
        layers run split, the last one excluded.
    max_num_batched_tokens: tokens of one step on one rank. max_num_seqs: requests that run
        at once on one rank. max_model_len: longest text, prompt and output together.
    block_size: tokens in a KV block. kv_cache_memory: bytes of the KV cache of one rank; by default a fixed size on
        the CPU, and on a GPU what the share gpu_memory_utilization of its memory leaves beside the weights and the
        largest step, which is run once to measure it.
    prefix_caching: keep the full KV blocks of texts that have ended, for prompts that begin alike.
    chunked_prefill: a prompt that is longer than what is left of a step takes several steps.
    seed: from which requests without a seed take theirs, and dummy weights. timeout_s: longest wait for another
        process. debug_order: compare the collectives of all ranks before every step. on_start: called with what the
        engine is doing while it starts, such as "loading the model: 35% of 14.2 GB".
    Options of other engines are accepted where they mean something here (docs/options.md), or refused by name.

    Raises `OptionError` and `ModelError` (both `ValueError`) before anything is started, `EngineError` if a worker
    does not come up. Not thread-safe. Leaving the context, `close`, and the end of the process end all workers.

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
        dbo_prefill_token_threshold: int | None = None,
        dbo_decode_token_threshold: int | None = None,
        imbalance_ratio: float = 0.1,
        min_total_tokens_to_split: int = 0,
        min_prefill_tokens_to_split: int = 0,
        dbo_start_layer: int = 0,
        dbo_end_layer: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        block_size: int = 16,
        kv_cache_memory: int | None = None,
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
        options = make_config({name: given[name] for name in OPTION_DEFAULTS}, foreign)
        self.config: ResolvedConfig = options.resolve()
        options = self.config.options
        self._asked_policy = options.policy
        for sentence in self.config.without_effect():
            logger.warning(sentence)
        self._tokenizer = NoTokenizer() if options.load_format == "dummy" else Tokenizer(options.model)
        self._client: Client = (
            InProcessClient(self.config, on_start) if options.ranks == 1 else WorkerClient(self.config, on_start)
        )
        self._close = weakref.finalize(self, self._client.close)
        ready = self._client.ready
        self.config = self.config.started(
            device_name=ready.device_name, transport_name=ready.transport_name, cache=ready.cache
        )
        self._policy = self.config.policy
        self._num_requests = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. The object cannot be used afterwards; calling it again does nothing."""
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
        progress: called with (prompts finished, prompts in all, tokens generated) after every step.
        Raises `RequestError` (a `ValueError`) before anything runs if a prompt cannot be served; the engine stays
        usable. Raises `EngineError` if a rank fails; the engine has ended then.
        """
        requests = self._make_requests(prompts, sampling_params)
        opened = {one.request.request_id: one for one in requests}
        by_rank: list[list[Request]] = [[] for _ in range(self.config.options.ranks)]
        for one in requests:
            by_rank[one.rank].append(one.request)
        num_finished = num_tokens = 0
        try:
            self._client.submit(by_rank)
            while num_finished < len(requests):
                for output in self._client.poll():
                    if (item := opened.get(output.request_id)) is not None:
                        _take(item, output)
                        num_tokens += output.token is not None
                        num_finished += output.finish_reason is not None
                if progress is not None:
                    progress(num_finished, len(requests), num_tokens)
        except BaseException:
            self._client.abort([one.request.request_id for one in requests if not one.finish_reason])
            raise
        return [self._output(one) for one in requests]

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat, ready for the assistant's answer: `[{"role": "user", "content": "..."}]`."""
        return self._tokenizer.chat(messages)

    def reconfigure(self, *, dbo: str | None = None, split: str | None = None) -> None:
        """Change `dbo` or `split` of all ranks between two calls of `generate`, without loading the model again."""
        config, asked = self.config, self._asked_policy
        asked = replace(asked, dbo=dbo or asked.dbo, split=split or asked.split)
        policy = settle_policy(
            asked, config.options.ranks, device_kind=config.device_kind, transport=config.transport.name
        )
        self._client.reconfigure(policy)
        self._asked_policy, self._policy = asked, policy

    def stats(self) -> dict[str, Any]:
        """Counts since the start.

        `steps`, `steps_by_plan` (plan -> steps), `serial_reasons` (reason -> steps), which are the same on all ranks;
        `overlap` (plan -> seconds of rank 0: `time_s`, `communication_s`, `hidden_s`, `exposed_s`, and `num_bytes`);
        `last_plan`, in words and with its numbers; `kv_cache` (tokens of a rank, and where the size comes from);
        summed over ranks: `kv_blocks`, `unfinished` and `running` requests, `preemptions`, `prefix_cache` (tokens of
        texts that were admitted, and how many of them were found, once more after a preemption); `ranks`, `device`, `transport`, `dbo`.
        """
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
            "dbo": self._policy.dbo,
            "last_plan": first["last_plan"],
        }

    def timelines(self) -> list[list[StepTimeline]]:
        """The last steps of every rank with all their events, oldest first."""
        return self._client.timelines()

    # ---- requests

    def _make_requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[_Open]:
        texts = prompt_list(prompts)
        params_list = params_for(texts, sampling_params)
        token_lists = [self._token_ids(place, prompt) for place, prompt in enumerate(texts)]
        load = [0] * self.config.options.ranks
        requests = []
        for place, (prompt, ids, params) in enumerate(zip(texts, token_lists, params_list, strict=True)):
            request = self._make_request(place, ids, params)
            rank = load.index(min(load))
            load[rank] += request.most_tokens
            text = prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)
            requests.append(_Open(place, request, text, rank))
        self._num_requests += len(requests)
        return requests

    def _make_request(self, place: int, prompt_ids: list[int], params: SamplingParams) -> Request:
        config = self.config
        longest = min(config.max_model_len - 1, config.max_num_batched_tokens)
        if len(prompt_ids) > longest:
            limit, remedy = (
                (f"max_model_len={config.max_model_len} leaves room for {longest}", "shorten it")
                if longest < config.max_num_batched_tokens
                else (f"a step takes at most {longest}", "raise max_num_batched_tokens")
            )
            raise RequestError(f"prompt {place} has {len(prompt_ids)} tokens, but {limit}; {remedy}")
        room = config.max_model_len - len(prompt_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        request = Request(
            request_id=self._num_requests + place,
            prompt_ids=tuple(prompt_ids),
            params=replace(
                params,
                max_tokens=max_tokens,
                min_tokens=min(params.min_tokens, max_tokens),
                top_k=min(params.top_k, config.model.vocab_size),
            ),
            max_tokens=max_tokens,
            seed=params.seed if params.seed is not None else config.options.seed + self._num_requests + place,
        )
        if request.most_tokens > config.kv_capacity_tokens:
            raise RequestError(
                f"prompt {place} and its output need {request.most_tokens} tokens of KV cache, but a rank holds "
                f"{config.kv_capacity_tokens}; lower max_tokens or raise kv_cache_memory"
            )
        return request

    def _token_ids(self, place: int, prompt: Prompt) -> list[int]:
        vocab_size = self.config.model.vocab_size
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise RequestError(f"prompt {place} is not valid Unicode text ({error}); repair or drop it") from None
            ids = self._tokenizer.encode(prompt)
        else:
            ids = plain_ints(prompt)
        if not ids:
            raise RequestError(f"prompt {place} is empty; give at least one token")
        if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
            return ids
        for token_id in ids:
            if not is_whole(token_id) or not 0 <= token_id < vocab_size:
                raise RequestError(f"prompt {place} has token id {token_id!r}; use integers from 0 to {vocab_size - 1}")
        return ids

    def _output(self, item: _Open) -> GeneratedOutput:
        params = item.request.params
        return GeneratedOutput(
            prompt=item.prompt,
            prompt_token_ids=list(item.request.prompt_ids),
            outputs=[
                CompletionOutput(
                    index=0,
                    text=self._tokenizer.decode(item.token_ids),
                    token_ids=item.token_ids,
                    finish_reason=item.finish_reason,
                    logits=self._logits(b"".join(item.logits)) if params.return_logits else None,
                )
            ],
            prompt_logits=self._logits(b"".join(item.prompt_logits)) if params.return_prompt_logits else None,
        )

    def _logits(self, data: bytes) -> torch.Tensor:
        dtype = torch.promote_types(self.config.dtype, torch.float32)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(-1, self.config.model.vocab_size)


def _take(item: _Open, output: TokenOutput) -> None:
    item.finish_reason = output.finish_reason or ""
    if output.token is not None:
        item.token_ids.append(output.token.token_id)
        if output.token.logits is not None:
            item.logits.append(output.token.logits)
    if output.prompt is not None and output.prompt.logits is not None:
        item.prompt_logits.append(output.prompt.logits)
