"""tools/serve_by_turns.py: real servers, one after another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.performance_tables import section

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(240)]

SIZES = ("--input-len", "40", "--output-len", "2", "--num-prompts", "6", "--max-concurrency", "3", "--rounds", "2")


def run_tool(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.serve_by_turns", "tiny-deepseek", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_servers_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    serve = ("--ranks", "2", "--device", "cpu", "--no-prefix-caching")
    ended = run_tool(*SIZES, *serve, "--runs", "1", "--json", str(path))
    assert ended.returncode == 0, ended.stderr
    result = json.loads(path.read_text())
    assert result == json.loads(ended.stdout.splitlines()[-1])
    said = [line.partition(":")[0] for line in ended.stderr.splitlines() if "requests/s" in line]
    assert said == ["dbo off", "dbo on", "dbo on", "dbo off"]
    assert {mode: len(runs) for mode, runs in result["runs"].items()} == {"off": 2, "on": 2}
    for runs in result["runs"].values():
        assert all(run["completed"] == 6 and run["total_output_tokens"] == 12 for run in runs)
    seeds = [run["seed"] for runs in result["runs"].values() for run in runs]
    assert len(set(seeds)) == 4, "a prompt came twice"
    assert len(result["devices"]) == 2 and result["devices"][0].startswith("CPU")
    figures, ratios = result["figures"], result["ratios"]["on"]
    assert figures["off"]["mean_ttft_ms"]["min"] > 0 and ratios["request_throughput"]["median"] > 0
    told = section("servers.json", result)
    assert "6 requests of 40 tokens in and 2 out, concurrency 3, `antiphon serve --ranks 2 --device cpu" in told
    assert f"| off | {figures['off']['request_throughput']['median']:.2f} |" in told


def test_a_server_that_does_not_start_ends_the_tool() -> None:
    ended = run_tool("--ranks", "0")
    assert ended.returncode == 1
    assert "ranks=0" in ended.stderr and "ended with 2" in ended.stderr
    assert "antiphon.cli serve tiny-deepseek --ranks 0 --dbo off" in ended.stderr
