"""The options that decide when a step is split."""

import subprocess
import sys
from dataclasses import fields
from itertools import combinations

import pytest

from antiphon.core.errors import OptionError
from antiphon.core.options import options_of
from antiphon.core.plan import MAX_LANES
from antiphon.core.policy import DBO_MODES, SPLIT_RULES, OverlapPolicy
from tests.support.errors import raises

OPTION_NAMES = {one.field: name for name, one in options_of(OverlapPolicy).items()}

OTHER_VALUES = {
    "dbo": ["on", "off"],
    "split": ["request-boundary"],
    "micro_batches": [3, 4],
    "prefill_threshold": [0, 1, 512],
    "decode_threshold": [0, 1, 32],
    "imbalance_ratio": [0.2, 0.0],
    "min_total_tokens": [1, 256],
    "min_prefill_tokens": [1, 64],
    "start_layer": [1, 2],
    "end_layer": [1, 2],
}


@pytest.mark.parametrize(
    ("options", "prefill", "decode"),
    [
        ({}, 512, 32),
        ({"dbo": "auto"}, 512, 32),
        ({"dbo": "on"}, 0, 0),
        ({"dbo": "on", "prefill_threshold": 512, "decode_threshold": 32}, 512, 32),
        ({"dbo": "on", "prefill_threshold": 100}, 100, 0),
        ({"dbo": "on", "decode_threshold": 5}, 0, 5),
        ({"dbo": "auto", "prefill_threshold": 0}, 0, 32),
        ({"dbo": "auto", "decode_threshold": 0}, 512, 0),
    ],
)
def test_thresholds(options, prefill, decode):
    policy = OverlapPolicy(**options)
    assert policy.threshold(decode_only=False) == prefill
    assert policy.threshold(decode_only=True) == decode


def test_defaults():
    policy = OverlapPolicy()
    assert (policy.dbo, policy.micro_batches, policy.imbalance_ratio) == ("auto", 2, 0.1)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("dbo", "onn", "'on'"),
        ("dbo", "Auto", "'auto'"),
        ("dbo", "of", "'off'"),
        ("dbo", True, "auto, off, on"),
        ("dbo", None, "auto, off, on"),
        ("split", "tokens", "'token'"),
        ("split", "request_boundary", "'request-boundary'"),
        *(("micro_batches", value, f"2 to {MAX_LANES}") for value in (1, MAX_LANES + 1, 2.0, "2", True, None)),
        *(("prefill_threshold", value, "0") for value in (-1, 1.5)),
        *(("decode_threshold", value, "0") for value in (-1, "32")),
        *(("min_total_tokens", value, "0") for value in (-1, None)),
        *(("min_prefill_tokens", value, "0") for value in (-1, 6.4)),
        *(("start_layer", value, "0") for value in (-1, None)),
        ("end_layer", "4", "0"),
        *(("imbalance_ratio", value, "0 to 1") for value in (-0.01, 1.01)),
    ],
)
def test_values_out_of_range_are_errors_that_say_what_is_valid(field, value, remedy):
    with raises(OptionError, option=OPTION_NAMES[field], value=value, remedy=remedy):
        OverlapPolicy(**{field: value})


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 3), (4, 3)])
def test_a_range_without_layers_is_an_error_that_names_both_ends(start, end):
    with raises(OptionError, f"dbo_start_layer={start}", option="dbo_end_layer", value=end, remedy="dbo='off'"):
        OverlapPolicy(start_layer=start, end_layer=end)


def test_a_ratio_that_is_no_number_is_an_error():
    with raises(OptionError, "nan", option="imbalance_ratio", remedy="0 to 1"):
        OverlapPolicy(imbalance_ratio=float("nan"))


@pytest.mark.parametrize("ratio", ["0.1", None, [0.1]])
def test_a_ratio_of_the_wrong_type_is_an_option_error(ratio):
    with raises(OptionError, option="imbalance_ratio", value=ratio, remedy="0 to 1"):
        OverlapPolicy(imbalance_ratio=ratio)


@pytest.mark.parametrize("name", ["prefill_threshold", "decode_threshold"])
def test_a_bool_is_no_count_of_tokens(name):
    with raises(OptionError, option=OPTION_NAMES[name], value=True):
        OverlapPolicy(**{name: True})


@pytest.mark.parametrize("dbo", DBO_MODES)
@pytest.mark.parametrize("split", SPLIT_RULES)
@pytest.mark.parametrize("micro_batches", range(2, MAX_LANES + 1))
def test_all_named_values_are_accepted(dbo, split, micro_batches):
    policy = OverlapPolicy(dbo=dbo, split=split, micro_batches=micro_batches)
    assert (policy.dbo, policy.split, policy.micro_batches) == (dbo, split, micro_batches)


@pytest.mark.parametrize("ratio", [0, 0.0, 1, 1.0])
def test_the_ends_of_the_ratio_are_accepted(ratio):
    assert OverlapPolicy(imbalance_ratio=ratio).imbalance_ratio == ratio


def test_other_values_cover_every_field():
    assert set(OTHER_VALUES) == {field.name for field in fields(OverlapPolicy)}


def test_fingerprints_differ_where_any_field_differs():
    variants = [OverlapPolicy()]
    variants += [OverlapPolicy(**{name: value}) for name, values in OTHER_VALUES.items() for value in values]
    for one, other in combinations(variants, 2):
        assert one.fingerprint() != other.fingerprint(), (one, other)


def test_fingerprints_of_equal_policies_are_equal():
    assert OverlapPolicy(dbo="on").fingerprint() == OverlapPolicy(dbo="on").fingerprint()


@pytest.mark.parametrize("ratio", [0, 1])
def test_fingerprints_are_equal_for_policies_that_compare_equal(ratio):
    """One rank's options come from a command line (1.0), another's from JSON (1)."""
    whole, real = OverlapPolicy(imbalance_ratio=ratio), OverlapPolicy(imbalance_ratio=float(ratio))
    assert whole == real
    assert whole.fingerprint() == real.fingerprint()


@pytest.mark.processes
def test_fingerprints_are_the_same_in_every_process():
    script = "from antiphon.core.policy import OverlapPolicy; print(OverlapPolicy(dbo='on').fingerprint())"
    printed = [
        subprocess.run([sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        for seed in ("1", "2")
    ]
    assert {int(process.stdout) for process in printed} == {OverlapPolicy(dbo="on").fingerprint()}


def test_fingerprints_fit_into_a_word_of_the_row():
    assert 0 <= OverlapPolicy().fingerprint() < 2**63


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dbo": "off"}, ["off", "serial"]),
        ({"dbo": "on"}, ["on", "2 micro-batches", "token", "always"]),
        ({"dbo": "on", "micro_batches": 3, "prefill_threshold": 7}, ["3 micro-batches", "from 7", "0 in decode"]),
        ({"dbo": "on", "min_total_tokens": 256, "min_prefill_tokens": 64}, ["at least 256 in total and 64 of prompts"]),
        ({"dbo": "on", "start_layer": 3}, ["layers 3 to the last"]),
        ({"dbo": "on", "end_layer": 9}, ["layers 0 to 8"]),
        ({"split": "request-boundary"}, ["auto", "request-boundary", "512", "32"]),
    ],
)
def test_the_description_is_one_line_with_what_holds(options, words):
    text = OverlapPolicy(**options).describe()
    assert "\n" not in text
    for word in words:
        assert word in text


def test_thresholds_without_effect_are_named():
    assert OverlapPolicy(dbo="auto", prefill_threshold=5, decode_threshold=6).without_effect() == []
    assert OverlapPolicy(dbo="off").without_effect() == []
    assert OverlapPolicy(dbo="off", prefill_threshold=5, decode_threshold=0).without_effect() == [
        "dbo_prefill_token_threshold=5 has no effect with dbo='off': no step is split",
        "dbo_decode_token_threshold=0 has no effect with dbo='off': no step is split",
    ]
    assert OverlapPolicy(dbo="off", min_total_tokens=256, start_layer=1, micro_batches=3).without_effect() == [
        "min_total_tokens_to_split=256 has no effect with dbo='off': no step is split",
        "dbo_start_layer=1 has no effect with dbo='off': no step is split",
    ]


def test_a_ratio_without_effect_is_named():
    assert OverlapPolicy(dbo="on", split="request-boundary", imbalance_ratio=0.3).without_effect() == []
    (sentence,) = OverlapPolicy(dbo="on", imbalance_ratio=0.3).without_effect()
    assert sentence == "imbalance_ratio=0.3 has no effect with split='token', which cuts anywhere"


def test_every_field_is_known_to_users_by_an_option():
    assert list(OPTION_NAMES) == [field.name for field in fields(OverlapPolicy)]
    assert OPTION_NAMES["prefill_threshold"] == "dbo_prefill_token_threshold"
