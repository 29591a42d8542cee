"""Functions on ranks: results are returned, and every kind of failure is reported and leaves no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from antiphon.bench.ranks import RanksError, run_on_ranks
from antiphon.core.errors import OptionError
from tests.support.errors import raises
from tests.support.waiting import wait_until

pytestmark = pytest.mark.processes

HERE = "tests.bench.rank_functions"


def run(name: str, **options: Any) -> list[Any]:
    return run_on_ranks(f"{HERE}:{name}", ranks=2, device="cpu", options=options, timeout_s=20, limit_s=40)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_home_in_order_of_rank() -> None:
    results = run_on_ranks(
        f"{HERE}:say",
        ranks=2,
        device="cpu",
        options={"repeats": 3, "names": ["a", "b"]},
        environment={"NCCL_P2P_DISABLE": "1"},
    )
    assert [result["rank"] for result in results] == [0, 1]
    for result in results:
        assert result["options"] == {"repeats": 3, "names": ["a", "b"]}
        assert result["everybody"] == [0, 10]
        assert result["device"] == "cpu"
        assert result["no_peers"] == "1"
        assert not is_running(result["pid"])
    assert results[0]["pid"] != results[1]["pid"] != os.getpid()


def test_the_traceback_of_a_rank_is_shown_and_the_others_are_not_waited_for() -> None:
    start = time.monotonic()
    with pytest.raises(RanksError) as caught:
        run("fail_on_one")
    assert time.monotonic() - start < 30  # rank 0 sleeps for 60 s
    message = str(caught.value)
    assert "rank 1 failed first" in message
    assert "RuntimeError: rank one has had enough" in message
    assert "in fail_on_one" in message  # the traceback, not only the error


def test_an_error_of_the_user_is_raised_as_itself() -> None:
    with raises(OptionError, "mauve", option="colour", remedy="red"):
        run("refuse")


def test_a_rank_that_dies_is_named() -> None:
    with raises(RanksError, "rank 0 ", "SIGKILL"):
        run("die")


def test_the_time_limit_ends_everything() -> None:
    with raises(RanksError, "[0, 1]", "2 s"):
        run_on_ranks(f"{HERE}:sleep", ranks=2, device="cpu", options={}, limit_s=2)


def test_a_result_that_is_not_json_is_an_error() -> None:
    with raises(RanksError, "JSON"):
        run("return_something_else")


def test_ranks_end_with_the_process_that_started_them() -> None:
    code = f"""
import sys
from antiphon.bench.ranks import run_on_ranks
run_on_ranks("{HERE}:sleep", ranks=2, device="cpu", options={{}})
"""
    with tempfile.TemporaryDirectory() as name:  # short: a socket's path has a limit
        folder = Path(name)
        parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": name})
        try:
            wait_until(lambda: len(ranks_below(folder)) == 2, "both ranks run")
        finally:
            parent.kill()
            parent.wait()
        wait_until(lambda: not ranks_below(folder), "the ranks have ended", within_s=10)
        wait_until(lambda: not any(folder.iterdir()), "their folder is gone", within_s=10)


def ranks_below(folder: Path) -> list[int]:
    """Pids of the rank processes whose folder lies in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"antiphon.bench.ranks" in words and any(word.startswith(bytes(folder)) for word in words):
            found.append(int(path.name))
    return [pid for pid in found if is_running(pid)]
