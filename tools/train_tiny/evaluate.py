"""Stage "eval": the figures of antiphon/data/tiny-deepseek/MODEL_CARD.md, with transformers' own forward.

Reads the model, its tokenizer and word_problems.jsonl from OUT, and heldout.txt if it is there. Without it the figures
on held-out prose are left out: perplexity, and the expert load on prose.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .measures import exact_match, expert_skew, perplexity
from .model import TrainingForward
from .word_problems import as_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PASSAGE_CHARS = 4000
NUM_CHECK_ROWS, CHECK_ROW_TOKENS = 8, 256  # for comparing the forwards
NUM_WRONG_SHOWN = 6
PROMPTS = ("Once upon a time there was a", "It was a dark and stormy night, and", "The old man looked at the sea and")
CHAT_PROMPTS = ("Hello!", "Tell me a story about a fox named Ruby.")


def grouped(problems: list[dict[str, str]], size: int = 8) -> list[str]:
    """The problems as plain text, `size` in one text."""
    texts = [as_text(p["question"], p["answer"]) for p in problems]
    return ["\n\n".join(texts[i : i + size]) for i in range(0, len(texts), size)]


def check_rows(tok: PreTrainedTokenizerBase, texts: list[str], device: str) -> torch.Tensor:
    """The beginnings of the first texts as ids [NUM_CHECK_ROWS, CHECK_ROW_TOKENS], for comparing the forwards."""
    rows = [tok(text)["input_ids"][:CHECK_ROW_TOKENS] for text in texts[:NUM_CHECK_ROWS]]
    return torch.tensor(rows, device=device)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| over all elements."""
    return ((a.float() - b).norm() / b.norm()).item()


def print_samples(model: PreTrainedModel, tok: PreTrainedTokenizerBase, question: str, device: str) -> None:
    """Print free text, greedy and sampled, and chat."""
    for prompt in PROMPTS:
        for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.95}):
            torch.manual_seed(0)
            inputs = tok(prompt, return_tensors="pt").to(device)
            ids = model.generate(input_ids=inputs["input_ids"], max_new_tokens=100, **sampling)
            print("---", "sampled (t=0.8, p=0.95)" if sampling["do_sample"] else "greedy")
            print(tok.decode(ids[0], skip_special_tokens=True))
    for message in (*CHAT_PROMPTS, question):
        chat = [{"role": "user", "content": message}]
        inputs = tok.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(input_ids=inputs["input_ids"].to(device), max_new_tokens=200, do_sample=False)
        print("--- chat:", message)
        print(tok.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def evaluate(out: Path, device: str, limit: int, full: bool = False) -> dict[str, Any]:
    """Print and return the figures, by dtype; `limit` word problems, and with `full` the 5-shot prompt too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # 1. Texts: word problems alone and in groups of eight, and the held-out prose in passages.
    tok = AutoTokenizer.from_pretrained(out)
    with open(out / "word_problems.jsonl") as file:
        all_problems = [json.loads(line) for line in file]
    problems = all_problems[:limit]
    groups = grouped(problems)
    heldout = (out / "heldout.txt").read_text() if (out / "heldout.txt").exists() else None
    if heldout is None:
        print(f"no heldout.txt in {out} (--stage prepare writes it): no perplexity and no expert load on prose")
        passages = []
        rows = check_rows(tok, grouped(all_problems), device)
    else:
        passages = [heldout[i : i + PASSAGE_CHARS] for i in range(0, len(heldout), PASSAGE_CHARS)]
        rows = check_rows(tok, [passage[:2000] for passage in passages], device)

    reference = None  # float32 logits of `rows`
    results: dict[str, Any] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).to(device).eval()

        # 2. Do the forwards agree?
        with torch.no_grad():
            logits = model(rows).logits
            if reference is None:
                reference = logits
                print(type(model).__name__, sum(p.numel() for p in model.parameters()), "parameters")
                error = relative_error(TrainingForward(model, torch.float32)(rows)[0], reference)
                print(f"training forward against transformers, float32: relative error {error:.2e}")
            else:
                error = relative_error(logits, reference)
                print(f"transformers bfloat16 against float32: relative error {error:.2e}")

        # 3. Figures.
        since_s = time.time()
        share_right, outcomes = exact_match(model, tok, problems, device)
        figures = {
            "exact_match": share_right,
            "exact_match_chat": exact_match(model, tok, problems, device, chat=True)[0],
        }
        if heldout is not None:
            measured = perplexity(model, tok, heldout, device)
            figures |= dict(zip(("perplexity", "bits_per_character", "heldout_tokens"), measured, strict=True))
        if full:
            figures["exact_match_5_shot"] = exact_match(model, tok, problems, device, shots=5)[0]
        results[name] = figures
        print(name, json.dumps(figures), f"{time.time() - since_s:.0f} s", flush=True)

        # 4. A closer look, once.
        if name == "float32":
            for o in [o for o in outcomes if not o.is_right][:NUM_WRONG_SHOWN]:
                right, got = (text.replace("\n", " / ") for text in (o.problem["answer"], o.answer))
                print("  wrong:", o.problem["question"], "|", right, "| got", got)
            kinds = {"problems": groups}
            if passages:
                kinds = {"prose": passages, "problems": groups, "both": passages + groups}
            results["expert_skew"] = {}
            for kind, texts in kinds.items():
                skew = results["expert_skew"][kind] = expert_skew(model, tok, texts, device)
                print(f"expert load max/mean, min/mean by layer ({kind}):", skew)
            print_samples(model, tok, problems[0]["question"], device)
    return results
