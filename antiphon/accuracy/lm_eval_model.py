"""`antiphon` as a model of lm_eval (EleutherAI's lm-evaluation-harness), backed by one `LLM`.

The harness asks for three things: a text up to a stop string, the likelihood of a continuation, and the likelihood of
a whole text. Requests that it makes at once go to the engine at once, which forms its own batches.

    lm = AntiphonLM(ranks=2, dbo="on")
    results = lm_eval.simple_evaluate(lm, tasks=["word_problems"], task_manager=...)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from antiphon.accuracy.evaluate import word_problem_rows
from antiphon.core.bundled import BUNDLED_MODEL
from antiphon.core.errors import OptionError, unknown_value
from antiphon.core.sampling import GeneratedOutput, SamplingParams
from antiphon.frontend.llm import LLM

logger = logging.getLogger("antiphon")

_DEVICE_OF_HARNESS = "cuda:0"
_SETTABLE = frozenset(item.name for item in fields(SamplingParams)) - {"n", "logprobs", "prompt_logprobs"}


@register_model("antiphon")
class AntiphonLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A model of lm_eval that sends all requests of a task to one engine.

    pretrained: the name of lm_eval's other models for `model`. max_length: maximum length of a text, prompt and output
        together; by default the engine's max_model_len. max_gen_toks: maximum number of tokens to generate, unless the
        task says otherwise. llm: an engine to use instead of a new one; the caller closes it.
    Everything else is an option of `LLM`. The harness always passes batch_size, which has no effect here, and device,
        whose default there, "cuda:0", means "auto" here.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        model: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str = "auto",
        llm: LLM | None = None,
        **engine: Any,
    ) -> None:
        super().__init__()
        if pretrained is not None and model is not None and pretrained != model:
            raise OptionError(
                f"pretrained={pretrained!r} and model={model!r} contradict each other",
                remedy="give one of them",
                option="model",
                value=model,
            )
        if str(batch_size) not in ("1", "auto") or max_batch_size is not None:
            logger.warning("batch_size has no effect: the engine fills its steps itself; max_num_seqs bounds them")
        self._owns_engine = llm is None
        if llm is None:
            device = "auto" if device == _DEVICE_OF_HARNESS else device
            llm = LLM(model or pretrained or BUNDLED_MODEL, device=device, **engine)
        self._llm = llm
        self.tokenizer = self._llm.get_tokenizer()
        self.max_length = min(max_length or self._llm.config.max_model_len, self._llm.config.max_model_len)
        self.max_gen_toks = max_gen_toks

    def close(self) -> None:
        """Close the engine, unless the caller passed it in."""
        if self._owns_engine:
            self._llm.close()

    # ---- what the harness calls

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The output of each request, up to but not including its first stop string."""
        prompts, params = [], []
        for context, asked in (request.args for request in requests):
            prompt_ids, one = self.tok_encode(context), self._sampling(asked)
            room = self.max_length - min(one.max_tokens or 1, self.max_length - 1)
            prompts.append(_ending(prompt_ids, room, "prompt"))
            params.append(one)
        return [output.text for output in self._generate(prompts, params, disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The logprob of each whole text. A text that is too long is scored in windows, every token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for place, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,  # less one token before them and the one that is generated
                context_len=1,
            )
            for context_ids, continuation_ids in map(make_disjoint_window, rolling):
                windows.append((None, context_ids, continuation_ids))
                owners.append(place)
        totals = [0.0] * len(requests)
        for place, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[place] += logprob
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The logprob of each (key, context, continuation), and whether greedy sampling would produce it."""
        prompts, counts = [], []
        for _key, context_ids, continuation_ids in requests:
            counts.append(min(len(continuation_ids), self.max_length - 2))
            prompts.append(_ending(context_ids + continuation_ids, self.max_length - 1, "context and continuation"))
        found = []
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        for output, count in zip(self._generate(prompts, params, disable_tqdm), counts, strict=True):
            assert output.prompt_logprobs is not None
            first = len(output.prompt_token_ids) - count
            scored = zip(output.prompt_token_ids[first:], output.prompt_logprobs[first:], strict=True)
            tokens = [by_id[token_id] for token_id, by_id in scored if by_id is not None]
            assert len(tokens) == count, "the first token of a text has no logprob"
            found.append((sum(token.logprob for token in tokens), all(token.rank == 1 for token in tokens)))
        return found

    # ---- texts and tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self._llm.config.options.model).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the checkpoint's special tokens unless the text already has them, as from a chat template."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a chat by the checkpoint's template. Without add_generation_prompt, the last message is left open."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    # ---- the engine

    def _sampling(self, asked: dict[str, Any]) -> SamplingParams:
        """The sampling parameters of a task: greedy unless it sets `do_sample` or a temperature."""
        values = dict(normalize_gen_kwargs(asked, default_max_gen_toks=self.max_gen_toks))
        values.pop("do_sample")
        values.setdefault("temperature", 0.0)
        stops, max_tokens = values.pop("until"), values.pop("max_gen_toks")
        for name in values.keys() - _SETTABLE:
            raise unknown_value("gen_kwargs", name, [*_SETTABLE, "do_sample", "until", "max_gen_toks"])
        return SamplingParams(max_tokens=max_tokens, stop=[text for text in stops if text] or None, **values)

    def _generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], quiet: bool
    ) -> list[GeneratedOutput]:
        with tqdm(total=len(prompts), desc="Requests finished", disable=quiet) as bar:

            def show(num_finished: int, _num: int, _num_tokens: int) -> None:
                if num_finished > bar.n:
                    bar.update(num_finished - bar.n)

            return self._llm.generate(prompts, params, progress=show)


def _ending(token_ids: list[int], room: int, what: str) -> list[int]:
    """The last `room` tokens: the beginning matters less."""
    if len(token_ids) > room:
        logger.warning("%s of %d tokens: only the last %d are used", what, len(token_ids), room)
    return token_ids[-room:]


_NUM_EXAMPLES = 32


def load_word_problems(**_: Any) -> DatasetDict:
    """`examples`, from which few-shot prompts are made, and `test`, 224 others, from the bundled file.

    lm_eval calls it with the metadata of the task, which are not used.
    """
    rows = word_problem_rows()
    return DatasetDict(
        {"examples": Dataset.from_list(rows[:_NUM_EXAMPLES]), "test": Dataset.from_list(rows[_NUM_EXAMPLES:])}
    )
