"""`antiphon bench serve`: a user-like load on any OpenAI-compatible server, and the latencies that users see.

Requests are sent when they are due, whether or not earlier ones are answered (open loop). Only `max_concurrency` holds
them back. Figures have the same names as in vLLM's serving benchmark:

    TTFT  time to the first token    TPOT  time per token after the first    ITL  gap between chunks    E2EL  the whole
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import inf, isfinite
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from antiphon.bench.serve.client import Answered, Target, ask_server
from antiphon.bench.serve.workload import Ask, Workload, arrival_times, make_asks
from antiphon.core.errors import AntiphonError, OptionError, unknown_value

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token, without the first",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
_CONNECT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The options of a load. Raises `OptionError` for invalid ones.

    model: `None` for the first one that the server lists. request_rate: requests per second, `inf` for all at once.
    max_concurrency: maximum number of requests in flight. num_warmups: requests before the load, as many at once as
    that, or one by one. percentiles: 0 to 100, for `percentile_metrics`.
    timeout_s: maximum silence of the server within a request.
    """

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = "/v1/completions"
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    workload: Workload = field(default_factory=Workload)
    request_rate: float = inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    percentile_metrics: tuple[str, ...] = tuple(METRICS)
    percentiles: tuple[float, ...] = (90.0, 99.0)
    timeout_s: float = 600.0
    detailed: bool = False

    def __post_init__(self) -> None:
        for name in self.percentile_metrics:
            if name not in METRICS:
                raise unknown_value("percentile-metrics", name, METRICS)
        for percentile in self.percentiles:
            if not 0 <= percentile <= 100:
                raise OptionError(
                    f"--metric-percentiles {percentile:g} is not a percentile",
                    remedy="use numbers from 0 to 100",
                    option="metric-percentiles",
                )
        if not self.base_url.startswith(("http://", "https://")):
            raise OptionError(
                f"--base-url {self.base_url} is not an HTTP address",
                remedy="use one such as http://127.0.0.1:8000",
                option="base-url",
            )
        if not self.endpoint.startswith("/"):
            raise OptionError(
                f"--endpoint {self.endpoint} is not a path", remedy="use one such as /v1/completions", option="endpoint"
            )
        try:
            httpx.URL(self.base_url + self.endpoint)
            _ = urlsplit(self.base_url).port  # checks the range
        except (httpx.InvalidURL, ValueError) as error:
            raise OptionError(
                f"{self.base_url + self.endpoint!r} is not a valid address",
                limit=str(error),
                remedy="use one such as http://127.0.0.1:8000 for --base-url, or a port up to 65535 for --port",
            ) from error
        if self.api_key is not None and re.fullmatch("[!-~]+", self.api_key) is None:
            raise OptionError(
                "the API key has characters other than visible ASCII", remedy="set OPENAI_API_KEY to the key"
            )

    @property
    def is_chat(self) -> bool:
        return self.endpoint.rstrip("/").endswith("chat/completions")


def run_serve(options: ServeOptions) -> dict[str, Any]:
    """Run the load against the server. The result can be written as JSON.

    Raises `OptionError` if the server cannot be reached or lists no model.
    """
    return asyncio.run(_run(options))


async def _run(options: ServeOptions) -> dict[str, Any]:
    workload = options.workload
    if options.is_chat and workload.dataset == "random":
        workload = replace(workload, as_text=True)  # a chat takes no token ids
    times = arrival_times(workload.num_prompts, options.request_rate, burstiness=options.burstiness, seed=workload.seed)
    asks = make_asks(workload, options.num_warmups)
    if options.is_chat and not all(isinstance(ask.prompt, str) for ask in asks):
        raise OptionError(
            f"{options.endpoint} takes no token ids", remedy="use /v1/completions, or texts in --dataset-path"
        )
    headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
    async with httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(options.timeout_s, connect=_CONNECT_S, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    ) as client:
        model = options.model or await _first_model(client, options.base_url)
        target = Target(
            url=options.base_url.rstrip("/") + options.endpoint,
            model=model,
            is_chat=options.is_chat,
            ignore_eos=options.ignore_eos,
            temperature=options.temperature,
        )

        async def ask(one: Ask) -> Answered:
            return await ask_server(client, one, target, keep_text=options.detailed)

        asks, warmups = asks[: workload.num_prompts], asks[workload.num_prompts :]
        # At the concurrency of the load, because a server also meets its larger steps for the first time.
        at_once, most = [0.0] * len(warmups), options.max_concurrency or 1
        for answered in (await timed_load(warmups, at_once, ask, max_concurrency=most))[0]:
            if answered.error:
                raise OptionError("a warm-up request was not answered", limit=answered.error)
        cpu_s = time.process_time()
        answers, duration_s = await timed_load(asks, times, ask, max_concurrency=options.max_concurrency)
        cpu_share = (time.process_time() - cpu_s) / duration_s
    return (
        _head(options, model)
        | serve_figures(answers, duration_s, options.percentiles)
        | {"client_cpu_share": cpu_share}
        | _tail(options, answers)
    )


async def _first_model(client: httpx.AsyncClient, base_url: str) -> str:
    url = base_url.rstrip("/") + "/v1/models"
    try:
        response = await client.get(url)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        remedy = "set OPENAI_API_KEY" if error.response.status_code in (401, 403) else "name the model with --model"
        raise OptionError(
            f"{url} answers {error.response.status_code} instead of a list of models", remedy=remedy
        ) from error
    except httpx.HTTPError as error:
        raise OptionError(
            f"{url} cannot be reached",
            limit=f"{type(error).__name__}: {error}",
            remedy="start a server there, for example with antiphon serve, or pass --base-url",
            option="base-url",
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise OptionError(f"{url} lists no model", remedy="name it with --model", option="model") from error


async def timed_load(
    asks: Sequence[Ask],
    times_s: Sequence[float],
    ask: Callable[[Ask], Any],
    *,
    max_concurrency: int | None = None,
) -> tuple[list[Answered], float]:
    """Start `ask` for each request at its time. Returns the outcomes in order, and the total time in seconds.

    ask: coroutine function from a request to `Answered`. A wait for `max_concurrency` does not count as lateness.
    Raises the first `AntiphonError` that `ask` raises, and cancels the other requests.
    """
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None
    start_s = time.perf_counter()

    async def later(one: Ask, at_s: float) -> Answered:
        await asyncio.sleep(max(0.0, start_s + at_s - time.perf_counter()))
        late_s = time.perf_counter() - start_s - at_s
        async with AsyncExitStack() as stack:
            if gate is not None:
                await stack.enter_async_context(gate)
            answered: Answered = await ask(one)
        answered.late_s = late_s
        return answered

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(later(one, at_s)) for one, at_s in zip(asks, times_s, strict=True)]
    except BaseExceptionGroup as errors:
        known, others = errors.split(AntiphonError)
        if known is None:
            raise
        raise _first(known) from others  # all have the same cause, such as an engine that has ended
    return [task.result() for task in tasks], time.perf_counter() - start_s


def _first(errors: BaseExceptionGroup[AntiphonError]) -> AntiphonError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def serve_figures(answers: Sequence[Answered], duration_s: float, percentiles: Sequence[float]) -> dict[str, Any]:
    """Throughput and latencies of the completely answered requests. All figures are 0 if there are none."""
    good = [one for one in answers if not one.error]
    num_input, num_output = sum(one.num_input for one in good), sum(one.num_output for one in good)
    samples_s = {
        "ttft": [one.first_s for one in good],
        "tpot": [(one.latency_s - one.first_s) / (one.num_output - 1) for one in good if one.num_output > 1],
        "itl": [gap for one in good for gap in one.gaps_s],
        "e2el": [one.latency_s for one in good],
    }
    figures: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration_s,
        "request_goodput": None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_concurrent_requests": _most_at_once(answers),
        "max_lateness_ms": max((one.late_s for one in answers), default=0.0) * 1e3,
    }
    for name, seconds in samples_s.items():
        ms = np.array(seconds or [0.0]) * 1e3
        figures[f"mean_{name}_ms"] = float(ms.mean())
        figures[f"median_{name}_ms"] = float(np.median(ms))
        figures[f"std_{name}_ms"] = float(ms.std())
        for percentile in percentiles:
            figures[f"p{percentile:g}_{name}_ms"] = float(np.percentile(ms, percentile))
    return figures


def _most_at_once(answers: Sequence[Answered]) -> int:
    events = sorted([(one.start_s, 1) for one in answers] + [(one.end_s, -1) for one in answers])
    return int(max(np.cumsum([change for _, change in events]), default=0))


def _head(options: ServeOptions, model: str) -> dict[str, Any]:
    workload = options.workload
    backend = "openai-chat" if options.is_chat else "openai"
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,  # the name that older scripts read
        "backend": backend,
        "label": None,
        "model_id": model,
        "tokenizer_id": None,  # not used
        "num_prompts": workload.num_prompts,
        "request_rate": options.request_rate if isfinite(options.request_rate) else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "dataset_name": workload.dataset,
        "random_input_len": workload.input_len if workload.dataset == "random" else None,
        "random_output_len": workload.output_len if workload.dataset == "random" else None,
        "ignore_eos": options.ignore_eos,
        "seed": workload.seed,
    }


def _tail(options: ServeOptions, answers: Sequence[Answered]) -> dict[str, Any]:
    """The reasons of failures, most frequent first; with `detailed` also figures of each request."""
    errors = [one.error for one in answers if one.error]
    tail: dict[str, Any] = {"failures": dict(Counter(errors).most_common())}
    if options.detailed:
        tail |= {
            "input_lens": [one.num_input for one in answers],
            "output_lens": [one.num_output for one in answers],
            "ttfts": [one.first_s for one in answers],
            "itls": [one.gaps_s for one in answers],
            "generated_texts": [one.text for one in answers],
            "reasoning_texts": [one.reasoning for one in answers],
            "errors": [one.error for one in answers],
        }
    return tail
