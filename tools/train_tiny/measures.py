"""What is measured of a model: exact match on word problems, perplexity, and the load of the experts.

`model` is any transformers causal language model and `tok` its tokenizer; only `expert_skew` knows the architecture.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .tokenizer import BOS
from .word_problems import as_text, train_problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 128
MAX_TEXT_TOKENS = 1024  # what the model was trained on
DEMO_SEED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A word problem, the model's answer to it, and whether the final numbers agree."""

    is_right: bool
    problem: dict[str, str]
    answer: str


def final_number(text: str) -> str | None:
    """The number after the first "####", or None."""
    match = re.search(r"####\s*(-?\d+)", text)
    return match.group(1) if match else None


def exact_match(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    problems: list[dict[str, str]],
    device: str,
    batch: int = 64,
    chat: bool = False,
    shots: int = 0,
) -> tuple[float, list[Outcome]]:
    """Share of the problems whose final number is right, with greedy decoding, and each problem's outcome.

    The prompt is the plain one, preceded by `shots` solved problems, or with `chat` the chat template.
    """
    r = Random(DEMO_SEED)
    prefix = "".join(as_text(*train_problem(r)) + "\n\n" for _ in range(shots))
    outcomes = []
    for i in range(0, len(problems), batch):
        part = problems[i : i + batch]
        if chat:
            chats = [[{"role": "user", "content": p["question"]}] for p in part]
            prompts = [tok.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        else:
            prompts = ["<|bos|>" + prefix + f"Question: {p['question']}\nAnswer:" for p in part]
        inputs = tok(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        for p, new_ids in zip(part, ids[:, inputs["input_ids"].shape[1] :], strict=True):
            answer = tok.decode(new_ids, skip_special_tokens=True)
            is_right = final_number(answer) == final_number(p["answer"])
            outcomes.append(Outcome(is_right=is_right, problem=p, answer=answer))
    return sum(o.is_right for o in outcomes) / len(problems), outcomes


def perplexity(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, text: str, device: str, window: int = MAX_TEXT_TOKENS
) -> tuple[float, float, int]:
    """Over consecutive windows of the text, each begun with <|bos|>.

    Returns the perplexity per token, the bits per character, and the number of tokens.
    """
    ids = tok(text, add_special_tokens=False)["input_ids"]
    total_nats = 0.0
    for i in range(0, len(ids), window - 1):
        row = torch.tensor([[BOS, *ids[i : i + window - 1]]], device=device)
        with torch.no_grad():
            logits = model(row).logits.float()
        total_nats += F.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum").item()
    return math.exp(total_nats / len(ids)), total_nats / math.log(2) / len(text), len(ids)


def expert_skew(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, texts: list[str], device: str
) -> dict[int, tuple[float, float]]:
    """max / mean and min / mean of the number of tokens that each routed expert gets, by layer with experts."""
    num_experts = model.config.n_routed_experts
    loads: dict[int, torch.Tensor] = {}
    hooks = []

    def count_into(i: int):
        def hook(module, inputs, outputs):
            chosen = outputs[2].reshape(-1).cpu()
            loads[i] = loads.get(i, 0) + torch.bincount(chosen, minlength=num_experts).double()

        return hook

    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            hooks.append(layer.mlp.gate.register_forward_hook(count_into(i)))
    for text in texts:
        ids = tok(text, return_tensors="pt")["input_ids"][:, :MAX_TEXT_TOKENS].to(device)
        with torch.no_grad():
            model(ids)
    for hook in hooks:
        hook.remove()
    return {
        i: (round((load.max() / load.mean()).item(), 2), round((load.min() / load.mean()).item(), 2))
        for i, load in loads.items()
    }
