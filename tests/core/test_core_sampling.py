"""Sampling parameters: what is accepted, and what is an error that says what is valid."""

from dataclasses import FrozenInstanceError
from decimal import Decimal

import pytest

from antiphon.core.errors import OptionError
from antiphon.core.sampling import SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [1, 16, 10**9]),
        ("temperature", [0, 0.0, 1, 0.7, 100, 100.0]),
        ("top_k", [0, 1, 50, 10**6]),
        ("top_p", [5e-324, 0.5, 1, 1.0]),
        ("seed", [None, 0, 1, 2**63 - 1]),
        ("ignore_eos", [True, False]),
        ("return_logits", [True, False]),
        ("return_prompt_logits", [True, False]),
    ],
)
def test_values_in_range_are_kept(name, values):
    for value in values:
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "values", "remedy"),
    [
        ("max_tokens", [0, -1, 1.0, 1.5, NAN, INF, True, "16", None, [16], Decimal(16)], "an integer of at least 1"),
        ("temperature", [-0.1, -1, 100.5, 101, NAN, INF, -INF, True, False, "1", None, 1j], "a number from 0"),
        ("top_k", [-1, 0.0, 1.5, NAN, INF, True, False, "5", None], "an integer of at least 0"),
        ("top_p", [0, 0.0, -0.5, 1.0001, 2, NAN, INF, True, False, "0.9", None], "a number above 0 and at most 1"),
        ("seed", [-1, 2**63, 1.0, NAN, True, False, "1", [1]], "an integer from 0"),
    ],
)
def test_values_out_of_range_or_of_a_wrong_type_are_errors(name, values, remedy):
    for value in values:
        with pytest.raises(OptionError, match=remedy) as caught:
            SamplingParams(**{name: value})
        assert str(caught.value).startswith(f"{name}={value!r} is ")


def test_option_errors_are_value_errors():
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(top_p=0)


def test_the_default_is_greedy():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.seed, params.max_tokens) == (0.0, 0, 1.0, None, 16)


def test_parameters_cannot_be_changed_past_the_check():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = -1


def test_unknown_parameters_are_errors():
    with pytest.raises(TypeError, match="temperatur"):
        SamplingParams(temperatur=1.0)
