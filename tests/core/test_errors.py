"""Families of errors, and the error for an unknown value."""

import pickle

import pytest

from antiphon.core import errors

ALL_ERRORS = [kind for name, kind in vars(errors).items() if name.endswith("Error")]


def test_every_error_is_an_antiphon_error():
    assert len(ALL_ERRORS) == 9
    assert all(issubclass(kind, errors.AntiphonError) for kind in ALL_ERRORS)


@pytest.mark.parametrize(
    "kind",
    [errors.OptionError, errors.ModelError, errors.RequestError, errors.PromptLengthError, errors.UnsupportedError],
)
def test_what_the_caller_can_mend_is_a_value_error(kind):
    assert issubclass(kind, ValueError)
    assert not issubclass(kind, RuntimeError)


@pytest.mark.parametrize("kind", [errors.LaneError, errors.PeerError, errors.EngineError])
def test_what_failed_underway_is_a_runtime_error(kind):
    assert issubclass(kind, RuntimeError)
    assert not issubclass(kind, ValueError)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [("alltoal", "alltoall"), ("all-to-all", "alltoall"), ("allgathr", "allgather"), ("locl", "local")],
)
def test_an_unknown_value_names_the_nearest(value, nearest):
    error = errors.unknown_value("transport", value, ["local", "allgather", "alltoall"])
    assert isinstance(error, errors.OptionError)
    assert str(error) == (
        f"transport={value!r} is not known; use one of allgather, alltoall, local; did you mean {nearest!r}?"
    )


@pytest.mark.parametrize("value", ["xyz", "", 3, None])
def test_a_value_near_nothing_names_only_what_is_valid(value):
    text = str(errors.unknown_value("transport", value, ["local", "allgather"]))
    assert text == f"transport={value!r} is not known; use one of allgather, local"


def test_valid_values_may_come_from_any_iterable_and_are_sorted():
    assert "use one of a, b, c" in str(errors.unknown_value("x", "zzz", iter(["c", "a", "b"])))


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({}, "the fact"),
        ({"limit": "the limit"}, "the fact: the limit"),
        ({"remedy": "the remedy"}, "the fact; the remedy"),
        ({"limit": "the limit", "remedy": "the remedy"}, "the fact: the limit; the remedy"),
    ],
)
@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_the_sentence_is_made_of_the_fields(kind, parts, sentence):
    error = kind("the fact", option="ranks", value=3, **parts)
    assert str(error) == sentence
    assert (error.fact, error.option, error.value) == ("the fact", "ranks", 3)
    assert (error.limit, error.remedy) == (parts.get("limit", ""), parts.get("remedy", ""))


def test_errors_survive_pickling_and_another_process():
    error = errors.OptionError("a fact", limit="a limit", remedy="a remedy", option="ranks", value=3)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.value, type(again)) == (str(error), 3, errors.OptionError)
    rebuilt = errors.OptionError(**error.fields())
    assert (str(rebuilt), rebuilt.option, rebuilt.value) == (str(error), "ranks", None)


def test_an_unknown_value_has_fields():
    error = errors.unknown_value("transport", "x", ["local"])
    assert (error.option, error.value) == ("transport", "x")
    assert "local" in error.remedy
