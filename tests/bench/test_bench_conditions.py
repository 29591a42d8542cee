"""Options of the benches: what they mean, and what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from antiphon.bench.conditions import (
    check_ranks,
    parse_counts,
    parse_names,
    parse_sizes,
    rank_environment,
    settle_transports,
    write_json,
)
from antiphon.core.errors import OptionError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("4K", [4096]),
        ("100,4K,1M,2G", [100, 4096, 2**20, 2 * 2**30]),
        ("4K..64K", [4096, 16384, 65536]),
        ("4K..100K", [4096, 16384, 65536, 102400]),
        ("1M..1M", [2**20]),
        ("4K..16K,1M", [4096, 16384, 2**20]),
    ],
)
def test_sizes(text: str, sizes: list[int]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "4k", "K", "0", "-4K", "4K...8K", "1M..4K", "4K,4K", "4 KB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(OptionError, match="--sizes"):
        parse_sizes(text)


def test_counts() -> None:
    assert parse_counts("512, 2048", "tokens") == [512, 2048]
    for text in ("0", "5.5", "-1", "a", "", "1,1"):
        with pytest.raises(OptionError, match="--tokens"):
            parse_counts(text, "tokens")


def test_names_are_checked() -> None:
    assert parse_names("dense, attention", "beside", ("dense", "attention")) == ["dense", "attention"]
    with pytest.raises(OptionError, match="did you mean 'attention'"):
        parse_names("atention", "beside", ("dense", "attention"))


def test_one_rank_is_refused() -> None:
    check_ranks(2)
    with pytest.raises(OptionError, match="--ranks 1"):
        check_ranks(1)


def test_transports_asked_for_are_taken_as_they_are() -> None:
    names = settle_transports("alltoall,simulated:allgather:1GB/s:1ms", device="cpu", ranks=2, peer_access=True)
    assert names == ["alltoall", "simulated:allgather:1GB/s:1ms"]
    with pytest.raises(OptionError, match="did you mean 'alltoall'"):
        settle_transports("alltoal", device="cpu", ranks=2, peer_access=True)


def test_without_peer_access_nccl_is_told() -> None:
    assert rank_environment(peer_access=True) == {}
    assert rank_environment(peer_access=False) == {"NCCL_P2P_DISABLE": "1"}


def test_a_result_is_one_line_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "result.json"
    write_json({"a": [1 / 3, {"b": 12345678.9}], "c": "text", "d": None, "e": 123456789}, path)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed) == json.loads(path.read_text())
    assert json.loads(printed) == {"a": [0.333333, {"b": 12345700.0}], "c": "text", "d": None, "e": 123456789}


def test_what_is_not_a_number_is_not_written() -> None:
    with pytest.raises(ValueError):
        write_json({"a": float("nan")}, None)
