"""The options of `antiphon bench decode`, and the engine that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from antiphon.config.engine_config import EngineConfig, ResolvedConfig
from antiphon.core.errors import OptionError
from antiphon.core.policy import OverlapPolicy

PLANS = ("serial", "dual", "eager")

UNTIMED_STEPS = 2
"""Steps after a change of plan that are not timed."""

_LANES = 2
_LEAST_STEP_TOKENS = 8192  # of a prefill step


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """The resolved options. A cell is one context, one number of sequences and one plan."""

    model: str
    ranks: int
    device: str
    sequences: list[int]  # on every rank
    contexts: list[int]  # tokens of a prompt
    plans: list[str]
    steps: int  # timed in a row
    repeats: int
    kernels: int  # rows of each kernel table; 0: no profile
    transport: str
    routing: str
    dtype: str
    num_layers: int | None
    seed: int
    peer_access: bool
    timeout_s: float

    def num_steps(self, plan: str) -> int:
        """Steps that are timed in a row. Eager ones are slow, so a quarter is enough."""
        return max(4, self.steps // 4) if plan == "eager" else self.steps

    def room(self, sequences: int, context: int) -> int:
        """The most steps from the first prompt to the end of a cell, each of which may add a token to a text."""
        prefill = -(-sequences * context // (self.max_step_tokens - sequences)) + 1
        timed = sum(UNTIMED_STEPS + self.num_steps(plan) for plan in self.plans)
        return prefill + (1 + self.repeats) * timed + 1

    @property
    def max_step_tokens(self) -> int:
        return max(_LEAST_STEP_TOKENS, 2 * max(self.sequences))

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(context + self.room(max(self.sequences), context) for context in self.contexts)

    def engine_config(self) -> EngineConfig:
        """The engine of every rank, which captures only the sizes that are measured."""
        halves = [-(-sequences // _LANES) for sequences in self.sequences]
        return EngineConfig(
            model=self.model,
            load_format="dummy",
            num_layers=self.num_layers,
            routing=self.routing,
            ranks=self.ranks,
            device=self.device,
            transport=self.transport,
            peer_access=self.peer_access,
            dtype=self.dtype,
            max_num_batched_tokens=self.max_step_tokens,
            max_num_seqs=max(self.sequences),
            cuda_graph_sizes=",".join(map(str, sorted({*self.sequences, *halves}))),
            prefix_caching=False,
            seed=self.seed,
            timeout_s=self.timeout_s,
            policy=OverlapPolicy(dbo="on" if "dual" in self.plans else "off", micro_batches=_LANES),
        )

    def resolve(self) -> ResolvedConfig:
        """Check the options before a process starts. Raises `OptionError`, `ModelError` for the model."""
        config = self.engine_config()
        positions = config.resolve().model.max_positions
        if self.longest > positions:
            most = positions - (self.longest - max(self.contexts))
            raise OptionError(
                f"--context {max(self.contexts)} is too long",
                limit=f"the model has {positions} positions, and a cell may add {self.longest - max(self.contexts)} "
                "tokens to a text",
                remedy=f"use at most {most}" if most > 0 else "use fewer --steps, --repeats or --sequences",
                option="context",
                value=max(self.contexts),
            )
        return replace(config, max_model_len=self.longest).resolve()
