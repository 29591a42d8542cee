"""What transformers computes from the bundled checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from antiphon.core.bundled import bundled_model


@lru_cache(maxsize=1)
def reference_model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()


@lru_cache(maxsize=256)
def reference_logits(token_ids: tuple[int, ...]) -> torch.Tensor:
    """Logits [S, V] at every position of one text, without a cache."""
    with torch.inference_mode():
        return reference_model()(torch.tensor([token_ids])).logits[0]


def reference_greedy(prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[int]:
    """What transformers chooses at each place of `token_ids`, given the tokens before it."""
    logits = reference_logits((*prompt_ids, *token_ids))
    return logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest over positions of |value - expected| / |expected|."""
    difference = torch.linalg.vector_norm(value - expected, dim=-1)
    return (difference / torch.linalg.vector_norm(expected, dim=-1)).max().item()
