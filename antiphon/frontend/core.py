"""What `LLM` and `AsyncEngine` share: the start, and the placement of requests.

`LLM` is the synchronous face of the engine, `AsyncEngine` the asynchronous one. They differ in who waits for the ranks;
both check, place and track requests through `Core`.
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
    """A result of a prompt, under way on a rank."""

    request: Request
    rank: int
    collector: Collector

    @property
    def most_tokens(self) -> int:
        """The maximum number of its tokens in the KV cache: the last generated token is never computed."""
        return len(self.request.prompt_ids) + self.request.max_tokens - 1


class Core:
    """The state shared by `LLM` and `AsyncEngine`. Not thread-safe: its owner serializes the calls.

    It is made before the ranks start, and `started` completes it. config: with every `auto` that can be resolved so
    far. Raises `OptionError` and `ModelError` for an engine that cannot start.
    """

    def __init__(self, options: EngineConfig) -> None:
        self._asked_policy = options.policy
        self.config: ResolvedConfig = options.resolve()
        for sentence in self.config.checkpoint_notes:
            logger.warning(sentence)
        self._warned = self._warn()
        check_memory(self.config)
        resolved = self.config.options
        self.tokenizer = NoTokenizer() if resolved.load_format == "dummy" else Tokenizer(resolved.model)
        self.config = with_end_token_of(self.tokenizer, self.config)
        self._load = [0] * resolved.mesh.dp  # most tokens that the open requests of each replica can have
        self._placed: dict[int, Placed] = {}

    def started(self, ready: Ready) -> None:
        """Complete the configuration with what the ranks reported when they had started."""
        self.config = self.config.started(
            device_name=ready.device_name,
            transport_name=ready.transport_name,
            data_path=ready.data_path,
            cache=ready.cache,
            attention=ready.attention,
            captured=ready.captured,
        )
        self._warn(but_not=self._warned)  # every `auto` is resolved now
        self.policy = self.config.resolved_policy
        self._requests = RequestMaker(self.config, self.tokenizer)
        self._logits_dtype = torch.promote_types(self.config.dtype, torch.float32)

    @property
    def num_open(self) -> int:
        """The number of results under way, on the ranks or on their way to them."""
        return len(self._placed)

    def place(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], *, streaming: bool
    ) -> list[list[Placed]]:
        """Place n results of each prompt, each on the least loaded rank.

        All prompts are checked before the first is placed, so a `RequestError` leaves nothing behind. streaming:
        whether the caller needs the texts piece by piece.
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
        """Group requests by rank, as `Client.submit` takes them."""
        found: list[list[Request]] = [[] for _ in self._load]
        for one in placed:
            found[one.rank].append(one.request)
        return found

    def forget(self, request_ids: Iterable[int]) -> list[int]:
        """Stop tracking requests. Returns the ids of those that were under way."""
        known = [number for number in request_ids if number in self._placed]
        for number in known:
            placed = self._placed.pop(number)
            self._load[placed.rank] -= placed.most_tokens
        return known

    def resolve_policy(self, *, dbo: str | None = None, split: str | None = None) -> ResolvedPolicy:
        """Return the policy of the options with `dbo` or `split` changed, and `auto` resolved."""
        asked = self._asked_policy
        return self.config.resolve_policy(replace(asked, dbo=dbo or asked.dbo, split=split or asked.split))

    def reconfigured(self, policy: ResolvedPolicy, *, dbo: str | None = None, split: str | None = None) -> None:
        """Record that the ranks have changed to `policy`, made by `resolve_policy(dbo=dbo, split=split)`."""
        asked = self._asked_policy
        self._asked_policy = replace(asked, dbo=dbo or asked.dbo, split=split or asked.split)
        self.policy = policy

    def _warn(self, but_not: Sequence[str] = ()) -> list[str]:
        """Warn of options without effect, except for the sentences in `but_not`. Returns all sentences."""
        sentences = self.config.without_effect()
        for sentence in sentences:
            if sentence not in but_not:
                logger.warning(sentence)
        return sentences
