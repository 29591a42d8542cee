"""Cut and join values with a token dimension: `None`, tensors, and lists and dicts of them. The two are inverses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from antiphon.core.errors import OptionError


def cut_tensors(value: Any, part_tokens: Sequence[int], *, dim: int = 0) -> list[Any]:
    """Cut `value` along its token dimension into parts of `part_tokens` tokens.

    value: `None`, a tensor, or a list, tuple or dict (cut by key) of these, nested or not. `None` is cut into `None`s.
    dim: the token dimension; -1 for positions with a leading dimension, such as `[3, T]` of multi-axis rope.
    Tensors come back as views. Raises `TypeError` naming any other type, `OptionError` if the sizes do not add up.
    """
    if value is None:
        return [None] * len(part_tokens)
    if isinstance(value, torch.Tensor):
        if value.dim() == 0:
            raise OptionError("a tensor without dimensions cannot be cut by tokens", remedy="give it a token dimension")
        if sum(part_tokens) != value.shape[dim] or min(part_tokens, default=0) < 0:
            raise OptionError(
                f"parts of {list(part_tokens)} tokens do not add up to {value.shape[dim]}",
                limit=f"the tensor has the shape {tuple(value.shape)}, and its token dimension is {dim}",
                remedy="pass part_tokens that add up, or another dim",
                option="part_tokens",
                value=list(part_tokens),
            )
        return list(torch.split(value, list(part_tokens), dim=dim))
    if type(value) in (list, tuple):
        columns = [cut_tensors(item, part_tokens, dim=dim) for item in value]
        return [type(value)(column[part] for column in columns) for part in range(len(part_tokens))]
    if isinstance(value, dict):
        cut = {key: cut_tensors(item, part_tokens, dim=dim) for key, item in value.items()}
        return [{key: parts[part] for key, parts in cut.items()} for part in range(len(part_tokens))]
    raise _wrong_type("cut", value)


def join_tensors(parts: Sequence[Any], *, dim: int = 0) -> Any:
    """The inverse of `cut_tensors`: join parts of the same structure along their token dimension.

    Raises `TypeError` for a type that cannot be joined, `OptionError` for parts of different structure or none.
    """
    if not parts:
        raise OptionError("there are no parts to join", remedy="pass at least one", option="parts", value=[])
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise _unlike("types", ", ".join(type(part).__name__ for part in parts))
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return first if len(parts) == 1 else torch.cat(list(parts), dim=dim)
    if type(first) in (list, tuple):
        if len({len(part) for part in parts}) > 1:
            raise _unlike("lengths", str([len(part) for part in parts]))
        return type(first)(join_tensors(items, dim=dim) for items in zip(*parts, strict=True))
    if isinstance(first, dict):
        if any(part.keys() != first.keys() for part in parts):
            raise _unlike("keys", str([sorted(part) for part in parts]))
        return {key: join_tensors([part[key] for part in parts], dim=dim) for key in first}
    raise _wrong_type("join", first)


def _unlike(what: str, found: str) -> OptionError:
    return OptionError(
        f"the parts have different {what}",
        limit=found,
        remedy="join the parts that one call of cut_tensors returned",
        option="parts",
    )


def _wrong_type(verb: str, value: object) -> TypeError:
    return TypeError(
        f"cannot {verb} a {type(value).__name__} by tokens; pass None, a tensor, or a list or dict of them"
    )
