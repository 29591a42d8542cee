"""What every face of the engine shares: how it starts, and where requests go.

`LLM` is its synchronous face, `AsyncEngine` its asynchronous one. They differ in who waits for the ranks; a request is
checked, placed on a rank, followed and forgotten here, in one way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from antiphon.config.engine_config import EngineConfig, ResolvedConfig
from antiphon.config.memory import check_memory
from antiphon.core.sampling import SamplingParams
from antiphon.engine.messages import Ready
from antiphon.engine.scheduling.request import Request
from antiphon.frontend.outputs import Collector
from antiphon.frontend.prompts import Prompt, RequestMaker
from antiphon.frontend.tokenizer import NoTokenizer, Tokenizer, with_end_token_of
from antiphon.planning import ResolvedPolicy

logger = logging.getLogger("antiphon")


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """One result of a prompt, under way on a rank."""

    request: Request
    rank: int
    collector: Collector

    @property
    def most_tokens(self) -> int:
        """Tokens that it can ever have in the KV cache: the last one that is generated is never computed."""
        return len(self.request.prompt_ids) + self.request.max_tokens - 1


class Core:
    """Not thread-safe: it belongs to whoever opens requests.

    Made before the ranks start; `started` completes it. config: with every `auto` resolved as far as it is known.
    Raises `OptionError` and `ModelError` for what cannot start.
    """

    def __init__(self, options: EngineConfig) -> None:
        self._asked_policy = options.policy
        self.config: ResolvedConfig = options.resolve()
        for sentence in self.config.checkpoint_notes:
            logger.warning(sentence)
        self._warned = self._warn()
        check_memory(self.config)
        checkpoint = self.config.options
        self.tokenizer = NoTokenizer() if checkpoint.load_format == "dummy" else Tokenizer(checkpoint.model)
        self.config = with_end_token_of(self.tokenizer, self.config)
        self._load = [0] * checkpoint.mesh.dp  # tokens that each replica may still come to
        self._placed: dict[int, Placed] = {}

    def started(self, ready: Ready) -> None:
        """The ranks have started, and said what they found."""
        self.config = self.config.started(
            device_name=ready.device_name,
            transport_name=ready.transport_name,
            data_path=ready.data_path,
            cache=ready.cache,
        )
        self._warn(but_not=self._warned)  # what `auto` is is known now
        self.policy = self.config.resolved_policy
        self._requests = RequestMaker(self.config, self.tokenizer)
        self._logits_dtype = torch.promote_types(self.config.dtype, torch.float32)

    @property
    def num_open(self) -> int:
        """Results under way, on the ranks or on their way to them."""
        return len(self._placed)

    def place(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], *, streaming: bool
    ) -> list[list[Placed]]:
        """Place n results of each prompt, each on the rank with the fewest tokens to come.

        All prompts are checked before the first is placed: `RequestError` leaves nothing behind. streaming: whether
        somebody wants texts piece by piece.
        """
        return [
            [self._place(request, streaming=streaming) for request in requests]
            for requests in self._requests.make(prompts, params)
        ]

    def _place(self, request: Request, *, streaming: bool) -> Placed:
        collector = Collector(self.tokenizer, request, logits_dtype=self._logits_dtype, streaming=streaming)
        placed = Placed(request, self._load.index(min(self._load)), collector)
        self._load[placed.rank] += placed.most_tokens
        self._placed[request.request_id] = placed
        return placed

    def by_rank(self, placed: Iterable[Placed]) -> list[list[Request]]:
        """The requests for each rank, as `Client.submit` takes them."""
        found: list[list[Request]] = [[] for _ in self._load]
        for one in placed:
            found[one.rank].append(one.request)
        return found

    def forget(self, request_ids: Iterable[int]) -> list[int]:
        """Requests that have ended or are to end: those among them that were under way."""
        known = [number for number in request_ids if number in self._placed]
        for number in known:
            placed = self._placed.pop(number)
            self._load[placed.rank] -= placed.most_tokens
        return known

    def resolve_policy(self, *, dbo: str | None = None, split: str | None = None) -> ResolvedPolicy:
        """The policy with `dbo` or `split` changed from what was asked for at the start, `auto` resolved."""
        asked = self._asked_policy
        return self.config.resolve_policy(replace(asked, dbo=dbo or asked.dbo, split=split or asked.split))

    def reconfigured(self, policy: ResolvedPolicy, *, dbo: str | None = None, split: str | None = None) -> None:
        """The ranks have changed to `resolve_policy` of the same words."""
        asked = self._asked_policy
        self._asked_policy = replace(asked, dbo=dbo or asked.dbo, split=split or asked.split)
        self.policy = policy

    def _warn(self, but_not: Sequence[str] = ()) -> list[str]:
        """Say which options change nothing, but for what was said before."""
        sentences = self.config.without_effect()
        for sentence in sentences:
            if sentence not in but_not:
                logger.warning(sentence)
        return sentences
