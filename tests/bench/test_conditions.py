"""Options of the benchmarks: their meaning, and the errors for invalid ones."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from antiphon.bench.conditions import (
    check_ranks,
    check_writable,
    parse_counts,
    parse_names,
    parse_sizes,
    resolve_transports,
    write_json,
)
from antiphon.cli import app
from antiphon.comm.needs import peer_environment
from antiphon.core.errors import OptionError
from tests.support.errors import raises


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("4K", [4096]),
        ("100,4K,1M,2G", [100, 4096, 2**20, 2 * 2**30]),
        ("4K..64K", [4096, 16384, 65536]),
        ("4K..100K", [4096, 16384, 65536, 102400]),
        ("1M..1M", [2**20]),
        ("4K..16K,1M", [4096, 16384, 2**20]),
        ("4k,1.5KiB,2MB", [4000, 1536, 2_000_000]),
    ],
)
def test_sizes(text: str, sizes: list[int]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "4q", "K", "0", "-4K", "4K...8K", "1M..4K", "4K,4K", "4 KB"])
def test_sizes_that_are_none(text: str) -> None:
    with raises(OptionError, "--sizes"):
        parse_sizes(text)


def test_counts() -> None:
    assert parse_counts("512, 2048", "tokens") == [512, 2048]
    assert parse_counts("2k,2K", "tokens") == [2000, 2048]
    for text in ("0", "5.5", "-1", "a", "", "1,1"):
        with raises(OptionError, "--tokens"):
            parse_counts(text, "tokens")


def test_names_are_checked() -> None:
    assert parse_names("dense, attention", "beside", ("dense", "attention")) == ["dense", "attention"]
    with raises(OptionError, option="beside", value="atention", remedy="'attention'"):
        parse_names("atention", "beside", ("dense", "attention"))


def test_one_rank_is_refused() -> None:
    check_ranks(2)
    with raises(OptionError, "--ranks 1", option="ranks", remedy="2"):
        check_ranks(1)


def test_transports_asked_for_are_taken_as_they_are() -> None:
    names = resolve_transports("alltoall,simulated:allgather:1GB/s:1ms", device="cpu", ranks=2, peer_access=True)
    assert names == ["alltoall", "simulated:allgather:1GB/s:1ms"]
    with raises(OptionError, value="alltoal", remedy="'alltoall'"):
        resolve_transports("alltoal", device="cpu", ranks=2, peer_access=True)


def test_without_peer_access_nccl_is_told() -> None:
    assert peer_environment(peer_access=True) == {}
    assert peer_environment(peer_access=False) == {"NCCL_P2P_DISABLE": "1"}


def test_a_result_is_one_line_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "result.json"
    write_json({"a": [1 / 3, {"b": 12345678.9}], "c": "text", "d": None, "e": 123456789}, path)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed) == json.loads(path.read_text())
    assert json.loads(printed) == {"a": [0.333333, {"b": 12345700.0}], "c": "text", "d": None, "e": 123456789}


def test_a_result_whose_file_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError):
        write_json({"a": 1}, tmp_path)
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_a_result_that_cannot_be_printed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError):
            write_json({"a": 1}, tmp_path / "result.json")
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.close()
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}


def test_a_file_that_can_be_written_stays_as_it_was(tmp_path: Path) -> None:
    check_writable(None, "json")
    check_writable(tmp_path / "new" / "result.json", "json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old.json").write_text("old")
    check_writable(tmp_path / "old.json", "json")
    assert (tmp_path / "old.json").read_text() == "old"
    (tmp_path / "link.json").symlink_to("target.json")
    check_writable(tmp_path / "link.json", "json")
    assert (tmp_path / "link.json").is_symlink() and not (tmp_path / "target.json").exists()
    os.mkfifo(tmp_path / "fifo")
    check_writable(tmp_path / "fifo", "json")


@pytest.mark.parametrize("words", [["comm", "--transports=alltoall"], ["overlap", "--transports=alltoall"], ["dbo"]])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", *words, "--device", "cpu", "--json", "/proc/no/result.json"])
    assert isinstance(done.exception, OptionError)
    assert done.exception.option == "json" and done.exception.limit
    assert "/proc/no/result.json" in str(done.exception)


@pytest.mark.parametrize("words", [["--result-dir", "/proc/no"], ["--result-filename", "/proc/no/result.json"]])
def test_so_is_that_of_a_load_on_a_server(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", "--base-url", "http://127.0.0.1:1", "--save-result", *words])
    assert isinstance(done.exception, OptionError)
    assert done.exception.option == words[0].removeprefix("--") and done.exception.limit
    assert "/proc/no/" in str(done.exception)


def test_what_is_not_a_number_is_not_written() -> None:
    with pytest.raises(ValueError):
        write_json({"a": float("nan")}, None)
