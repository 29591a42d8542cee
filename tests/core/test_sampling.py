"""Sampling parameters: what is accepted, and what is an error that says what is valid."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, asdict, replace
from decimal import Decimal
from types import MappingProxyType

import msgspec
import pytest

from antiphon.core.errors import OptionError
from antiphon.core.sampling import NEUTRAL_SAMPLING, SamplingParams
from tests.support.errors import raises

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [1, 2, 128]),
        ("max_tokens", [1, 16, 10**9, None]),
        ("min_tokens", [0, 1, 16]),
        ("temperature", [0, 0.0, 1, 0.7, 100, 100.0]),
        ("top_k", [-1, 0, 1, 50, 10**6]),
        ("top_p", [5e-324, 0.5, 1, 1.0]),
        ("min_p", [0, 0.0, 0.1, 1]),
        ("presence_penalty", [-2, -0.5, 0, 2.0]),
        ("frequency_penalty", [-2, -0.5, 0, 2.0]),
        ("repetition_penalty", [0.01, 0.5, 1, 1.2, 100]),
        ("seed", [None, 0, 1, 2**63 - 1]),
        ("logprobs", [None, 0, 1, 20]),
        ("prompt_logprobs", [None, 0, 1, 20]),
        ("stop", [None, ("a",), ("a", " b\n")]),
        ("stop_token_ids", [None, (0,), (5, 7)]),
        ("logit_bias", [None, {3: -100.0}, {0: 100.0, 7: 0.5}]),
        ("include_stop_str_in_output", [True, False]),
        ("ignore_eos", [True, False]),
        ("skip_special_tokens", [True, False]),
        ("return_logits", [True, False]),
        ("return_prompt_logits", [True, False]),
    ],
)
def test_values_in_range_are_kept(name, values):
    for value in values:
        params = SamplingParams(**{name: value})
        assert getattr(params, name) == value
        assert replace(params) == params
        assert SamplingParams(**msgspec.msgpack.decode(msgspec.msgpack.encode(asdict(params)), strict=False)) == params


def test_every_parameter_is_in_the_tables_of_this_file():
    tables = [mark.args[1] for mark in test_values_in_range_are_kept.pytestmark]
    assert {name for name, _ in tables[0]} == {*SamplingParams.__dataclass_fields__}


COUNT = [0, -1, 1.0, 1.5, NAN, INF, True, "16", [16], Decimal(16)]
NUMBER = [NAN, INF, -INF, True, False, "1", 1j]


@pytest.mark.parametrize(
    ("name", "values", "remedy"),
    [
        ("n", [*COUNT, None, 129], "1 to 128"),
        ("max_tokens", COUNT, "1, or None"),
        ("min_tokens", [-1, 1.0, NAN, True, "1", None], "0"),
        ("temperature", [-0.1, -1, 100.5, 101, *NUMBER], "100"),
        ("top_k", [-2, 0.0, 1.5, NAN, INF, True, False, "5"], "-1"),
        ("top_p", [0, 0.0, -0.5, 1.0001, 2, *NUMBER], "1"),
        ("min_p", [-0.01, 1.01, *NUMBER], "1"),
        ("presence_penalty", [-2.1, 2.1, None, *NUMBER], "-2 to 2"),
        ("frequency_penalty", [-2.1, 2.1, None, *NUMBER], "-2 to 2"),
        ("repetition_penalty", [0, 0.009, -1, 100.1, *NUMBER], "0.01 to 100"),
        ("seed", [-1, 2**63, 1.0, NAN, True, False, "1", [1]], "2**63 - 1"),
        ("logprobs", [-1, 21, 1.0, True, "5"], "return_logits"),
        ("prompt_logprobs", [-1, 21, 1.0, True, "5"], "return_prompt_logits"),
        ("ignore_eos", [0, 1, None, "yes"], ""),
        ("include_stop_str_in_output", [0, 1, None, "yes"], ""),
        ("return_logits", [0, 1, None, "yes"], ""),
        ("return_prompt_logits", [0, 1, None, "yes"], ""),
    ],
)
def test_values_out_of_range_or_of_a_wrong_type_are_errors(name, values, remedy):
    for value in values:
        with raises(OptionError, f"{name}={value!r}", option=name, remedy=remedy) as raised:
            SamplingParams(**{name: value})
        assert raised.error.value is value


@pytest.mark.parametrize(
    ("option", "given", "value", "names"),
    [
        ("stop", 5, 5, ["int"]),
        ("stop", b"a", b"a", ["bytes"]),
        ("stop", "", "", []),
        ("stop", ["a", ""], "", []),
        ("stop", ["a", 3], 3, []),
        ("stop", ["a"] * 17, ["a"] * 17, ["17", "16"]),
        ("stop", "x" * 257, "x" * 257, ["257", "256"]),
        ("stop", ["a", "\udcff"], "\udcff", ["surrogates not allowed"]),
        ("stop_token_ids", 7, 7, ["int"]),
        ("stop_token_ids", "7", "7", ["str"]),
        ("stop_token_ids", [-1], -1, ["0"]),
        ("stop_token_ids", [1.0], 1.0, ["0"]),
        ("logit_bias", [1], [1], ["list"]),
        ("logit_bias", {"9" * 5000: 1}, "9" * 5000, ["9999"]),
        ("logit_bias", {-1: 1}, -1, ["-1"]),
        ("logit_bias", {"x": 1}, "x", ["'x'"]),
        ("logit_bias", {1: 100.5}, 100.5, ["token 1", "-100 to 100"]),
        ("logit_bias", {1: NAN}, NAN, ["token 1", "-100 to 100"]),
        ("logit_bias", {1: "2"}, "2", ["token 1", "-100 to 100"]),
    ],
)
def test_refusals(option, given, value, names):
    with raises(OptionError, *names, option=option) as raised:
        SamplingParams(**{option: given})
    assert raised.error.value is value or raised.error.value == value
    assert raised.error.remedy
    assert len(str(raised.error)) < 400 or option == "stop"


@pytest.mark.parametrize("params", [{"min_tokens": 17}, {"min_tokens": 3, "max_tokens": 2}])
def test_more_tokens_at_least_than_at_most_is_an_error(params):
    most = params.get("max_tokens", 16)
    with raises(
        OptionError, f"max_tokens={most}", option="min_tokens", value=params["min_tokens"], remedy="max_tokens"
    ):
        SamplingParams(**params)


def test_other_ways_to_say_the_same():
    assert SamplingParams(stop="end") == SamplingParams(stop=["end"])
    assert SamplingParams(stop=[]) == SamplingParams(stop=None)
    assert SamplingParams(stop_token_ids=range(2)) == SamplingParams(stop_token_ids=[0, 1])
    assert SamplingParams(logit_bias={"50": 1}) == SamplingParams(logit_bias={50: 1.0})
    assert SamplingParams(logit_bias={}).logit_bias is None
    assert SamplingParams(logit_bias=MappingProxyType({5: 1})).logit_bias == {5: 1.0}


def test_the_callers_dict_is_copied():
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[6] = 1000.0
    assert isinstance(params.logit_bias, Mapping) and dict(params.logit_bias) == {5: 1.0}


def test_parameters_can_be_keys():
    assert len({SamplingParams(logit_bias={1: 2.0}), SamplingParams(logit_bias={1: 2.0}), SamplingParams(n=2)}) == 2


def test_who_wants_the_prompt():
    assert not SamplingParams(logprobs=1, return_logits=True).wants_prompt
    assert SamplingParams(prompt_logprobs=0).wants_prompt
    assert SamplingParams(return_prompt_logits=True).wants_prompt


def test_option_errors_are_value_errors():
    with pytest.raises(ValueError) as refused:
        SamplingParams(top_p=0)
    assert isinstance(refused.value, OptionError) and refused.value.option == "top_p"


def test_what_decides_the_choice_is_left_open_by_default():
    params = SamplingParams()
    assert [getattr(params, name) for name in NEUTRAL_SAMPLING] == [None] * 5
    assert (params.seed, params.max_tokens, params.n, params.min_tokens, params.stops) == (None, 16, 1, 0, ())
    assert {name: getattr(params.resolve({}), name) for name in NEUTRAL_SAMPLING} == NEUTRAL_SAMPLING


def test_parameters_cannot_be_changed_past_the_check():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = -1


def test_unknown_parameters_are_errors():
    with pytest.raises(TypeError, match="temperatur"):
        SamplingParams(temperatur=1.0)
