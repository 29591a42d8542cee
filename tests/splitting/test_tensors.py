"""Cutting and joining values along their token dimension."""

from itertools import combinations, pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.errors import OptionError
from antiphon.splitting import cut_tensors, join_tensors
from tests.support.errors import raises


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def same(one, other) -> bool:
    """Equal in structure, types, dtypes and values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other


@st.composite
def values(draw, num_tokens: int):
    dtypes = st.sampled_from([torch.int64, torch.float32, torch.bfloat16, torch.bool])
    tensors = st.builds(
        lambda width, dtype: torch.randint(0, 100, (num_tokens, *width)).to(dtype),
        st.sampled_from([(), (1,), (3,), (2, 2)]),
        dtypes,
    )
    return draw(
        st.recursive(
            st.none() | tensors,
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.lists(inner, max_size=3).map(tuple)
                | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
            ),
            max_leaves=6,
        )
    )


@st.composite
def values_and_parts(draw):
    part_tokens = draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    return draw(values(sum(part_tokens))), part_tokens


@settings(deadline=None)
@given(values_and_parts())
def test_join_is_the_exact_inverse_of_cut(case):
    value, part_tokens = case
    parts = cut_tensors(value, part_tokens)
    assert len(parts) == len(part_tokens)
    assert same(join_tensors(parts), value)


def test_each_part_has_its_own_tokens():
    first, second, third = cut_tensors(numbered(5, 2), [2, 0, 3])
    assert first.tolist() == [[0, 1], [2, 3]]
    assert second.shape == (0, 2)
    assert third.tolist() == [[4, 5], [6, 7], [8, 9]]


def test_structures_are_cut_into_equal_structures():
    value = {"hidden": numbered(3), "residual": None, "pair": (numbered(3), [numbered(3, 1), None])}
    first, second = cut_tensors(value, [1, 2])
    assert same(first, {"hidden": numbered(3)[:1], "residual": None, "pair": (numbered(3)[:1], [numbered(1, 1), None])})
    assert same(second["pair"][1][0], numbered(3, 1)[1:])
    assert list(second) == ["hidden", "residual", "pair"]


def test_none_is_cut_into_nones_and_joined_to_none():
    assert cut_tensors(None, [3, 2]) == [None, None]
    assert join_tensors([None, None]) is None


def test_parts_are_views():
    value = numbered(4)
    cut_tensors([value], [1, 3])[1][0].zero_()
    assert value.tolist() == [0, 0, 0, 0]


def test_positions_of_multi_axis_rope_are_cut_in_the_last_dimension():
    positions_3T = numbered(3, 5)
    first, second = cut_tensors(positions_3T, [2, 3], dim=-1)
    assert first.tolist() == [[0, 1], [5, 6], [10, 11]]
    assert second.tolist() == [[2, 3, 4], [7, 8, 9], [12, 13, 14]]
    assert torch.equal(join_tensors([first, second], dim=-1), positions_3T)


NUM_TOKENS = 7
WRAPPED = {
    "tensor": lambda positions: positions,
    "list": lambda positions: [positions, None, positions + 100],
    "tuple": lambda positions: (None, positions),
    "dict": lambda positions: {"positions": positions, "deltas": None, "deep": [{"x": positions * 2}]},
    "none": lambda positions: None,
}


def part_lists(num_tokens: int):
    """The tokens of the parts, for every cut in two, in three, and with an empty part at every place."""
    for num_cuts in (1, 2):
        for cuts in combinations(range(1, num_tokens), num_cuts):
            lengths = [stop - start for start, stop in pairwise([0, *cuts, num_tokens])]
            yield lengths
            yield from ([*lengths[:place], 0, *lengths[place:]] for place in range(len(lengths) + 1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_positions_of_multi_axis_rope_at_every_cut(wrap, dtype):
    """Each part has its own tokens on all axes, and joining gives back what there was."""
    positions_3T = torch.randint(0, 1000, (3, NUM_TOKENS), generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = wrap(positions_3T)
    num_cases = 0
    for part_tokens in part_lists(NUM_TOKENS):
        parts = cut_tensors(whole, part_tokens, dim=-1)
        start = 0
        for part, num_tokens in zip(parts, part_tokens, strict=True):
            assert same(part, wrap(positions_3T[:, start : start + num_tokens]))
            start += num_tokens
        assert same(join_tensors(parts, dim=-1), whole)
        num_cases += 1
    assert num_cases == 6 * (1 + 3) + 15 * (1 + 4)


def test_positions_of_one_axis_and_of_several_are_cut_alike():
    """The last dimension is that of the tokens for both."""
    for part_tokens in part_lists(NUM_TOKENS):
        one = cut_tensors(numbered(NUM_TOKENS), part_tokens, dim=-1)
        three = cut_tensors(numbered(NUM_TOKENS).expand(3, -1), part_tokens, dim=-1)
        assert all(torch.equal(axis, part) for part, axes in zip(one, three, strict=True) for axis in axes)


def test_positions_of_as_many_tokens_as_axes_are_cut_in_the_last_dimension():
    """[3, 3] could be cut the wrong way without an error."""
    first, second = cut_tensors(numbered(3, 3), [1, 2], dim=-1)
    assert first.tolist() == [[0], [3], [6]]
    assert second.tolist() == [[1, 2], [4, 5], [7, 8]]


def test_the_dimension_holds_for_nested_tensors():
    value = {"positions": [numbered(3, 4)], "other": (numbered(4),)}
    parts = cut_tensors(value, [1, 3], dim=-1)
    assert parts[0]["positions"][0].shape == (3, 1)
    assert same(join_tensors(parts, dim=-1), value)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: (None, x), lambda x: {"deep": [{"x": x}]}])
@pytest.mark.parametrize(("wrong", "name"), [(3, "int"), ("text", "str"), ({1, 2}, "set"), (2.5, "float")])
def test_any_other_type_is_an_error_that_names_it(wrap, wrong, name):
    with pytest.raises(TypeError, match=rf"\b{name}\b"):
        cut_tensors(wrap(wrong), [1, 2])
    with pytest.raises(TypeError, match=rf"\b{name}\b"):
        join_tensors([wrap(wrong), wrap(wrong)])


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


def test_a_named_tuple_is_cut_and_joined_or_refused_as_a_type():
    value = Pair(numbered(3), None)
    try:
        parts = cut_tensors(value, [1, 2])
    except TypeError as error:
        assert "Pair" in str(error)
    else:
        assert same(join_tensors(parts), value)


@pytest.mark.parametrize("part_tokens", [[2, 2], [3, 3], [5, 1], [6], []])
def test_sizes_that_do_not_add_up_are_an_error_that_names_them(part_tokens):
    with raises(OptionError, "to 5", "(5, 2)", option="part_tokens", value=part_tokens):
        cut_tensors({"x": [numbered(5, 2)]}, part_tokens)


def test_sizes_are_checked_in_the_dimension_that_is_cut():
    with raises(OptionError, "-1", "(5, 3)", option="part_tokens", value=[2, 3], remedy="dim"):
        cut_tensors(numbered(5, 3), [2, 3], dim=-1)


def test_nothing_to_join_is_an_error():
    with raises(OptionError, option="parts", value=[]):
        join_tensors([])


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([numbered(1), None], "Tensor, NoneType"),
        ([[numbered(1)], (numbered(1),)], "list, tuple"),
        ([[numbered(1)], []], "[1, 0]"),
        ([{"a": numbered(1)}, {"b": numbered(1)}], "[['a'], ['b']]"),
        ([{"a": [None]}, {"a": [numbered(1)]}], "NoneType, Tensor"),
    ],
)
def test_parts_of_different_structure_are_errors(parts, found):
    with raises(OptionError, found, option="parts", remedy="cut_tensors"):
        join_tensors(parts)


def test_dictionaries_are_joined_by_key_and_not_by_position():
    one, two = {"a": numbered(1), "b": None}, {"b": None, "a": numbered(2)}
    assert same(join_tensors([one, two]), {"a": torch.tensor([0, 0, 1]), "b": None})
