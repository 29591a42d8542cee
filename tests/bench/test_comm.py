"""`antiphon bench comm` on two CPU ranks, and the figures derived from its times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.bench.comm.bodies import BODY_NAMES, UNITS, make_body
from antiphon.bench.comm.exchanges import summarize_exchanges


@pytest.mark.processes
def test_exchanges_are_measured_alone_and_beside_computation(tmp_path: Path) -> None:
    slow = "simulated:allgather:2MB/s:100us"
    for attempt in range(3):  # if the system takes the processor away for a while
        cells = measured_cells(tmp_path / f"{attempt}.json", slow)
        (slow_cell,) = [cell for cell in cells if cell["transport"] == slow and cell["size_bytes"] == 16384]
        if all(is_hidden(body, slow_cell["exchange_ms"]["min"]) for body in slow_cell["beside"].values()):
            break
    else:
        pytest.fail(f"nothing is hidden: {slow_cell}")
    assert slow_cell["gigabytes_per_s"] < 2e-3  # the link model's bandwidth
    assert [(cell["size_bytes"], cell["transport"]) for cell in cells] == [
        (4096, "alltoall"),
        (4096, slow),
        (16384, "alltoall"),
        (16384, slow),
    ]
    for cell in cells:
        # Rows carry routes besides 512 bytes of hidden state; sums come home without them.
        assert cell["num_bytes"] == pytest.approx(2 * cell["size_bytes"], rel=0.15)
        assert cell["exchanges"] % 2 == 0
        assert cell["gigabytes_per_s"] == pytest.approx(
            cell["num_bytes"] * 1e-6 / cell["exchange_ms"]["median"], rel=1e-4
        )
        assert set(cell["beside"]) == ({"grouped", "attention"} if cell["size_bytes"] == 16384 else set())
        for body in cell["beside"].values():
            alone, exchange, both = (ms["median"] for ms in (body["compute_ms"], cell["exchange_ms"], body["both_ms"]))
            assert body["overlap_efficiency"] == pytest.approx(
                (alone + exchange - both) / min(alone, exchange), abs=1e-3
            )


def measured_cells(path: Path, slow: str) -> list[dict[str, Any]]:
    """Of the command, which says the same on its last line, in its file and, in words, in its table."""
    arguments = ["--sizes", "4K,16K", "--beside-from", "16K", "--hidden-size", "256", "--repeats", "5"]
    command = [sys.executable, "-m", "antiphon.cli", "bench", "comm", "--device", "cpu", *arguments]
    command += ["--transports", f"alltoall,{slow}", "--beside", "grouped,attention"]
    command += ["--json", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 0, ended.stderr
    assert slow in ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result == json.loads(path.read_text())
    cells: list[dict[str, Any]] = result["results"]
    return cells


def is_hidden(body: dict[str, Any], exchange_ms: float) -> bool:
    """A link model leaves the processor to the computation, which is about as long, were the machine always as fast."""
    alone_ms, both_ms = body["compute_ms"]["min"], body["both_ms"]["min"]
    shorter_ms = min(alone_ms, exchange_ms)
    return shorter_ms > 0.05 * exchange_ms and (alone_ms + exchange_ms - both_ms) / shorter_ms > 0.3


def cell_of(exchange_ms: list[float], compute_ms: list[float], both_ms: list[float]) -> dict[str, Any]:
    beside = {"dense": {"size": "any", "units": 3, "compute_ms": compute_ms, "both_ms": both_ms}}
    head = {"transport": "alltoall", "size_bytes": 1000, "tokens": 4, "exchanges": 2, "num_bytes": 2_000_000}
    return {**head, "exchange_ms": exchange_ms, "beside": beside}


def test_the_slowest_rank_of_each_repeat_counts() -> None:
    (cell,) = summarize_exchanges(
        [
            [cell_of([1.0, 4.0, 2.0], [3.0, 3.0, 3.0], [4.0, 4.0, 4.0])],
            [cell_of([2.0, 1.0, 2.0], [2.0, 2.0, 2.0], [3.0, 3.0, 5.0])],
        ]
    )
    assert cell["exchange_ms"] == {"median": 2.0, "min": 2.0, "max": 4.0}
    assert cell["gigabytes_per_s"] == pytest.approx(1.0)
    assert cell["beside"]["dense"]["compute_ms"]["median"] == 3.0
    assert cell["beside"]["dense"]["both_ms"]["median"] == 4.0
    assert cell["beside"]["dense"]["overlap_efficiency"] == pytest.approx((3 + 2 - 4) / 2)


@pytest.mark.parametrize("name", BODY_NAMES)
def test_a_body_computes_as_many_units_as_asked(name: str) -> None:
    body = make_body(name, torch.device("cpu"))
    whole, part = body.launch(UNITS), body.launch(4)
    assert isinstance(whole, torch.Tensor) and isinstance(part, torch.Tensor)
    assert part.numel() * UNITS == whole.numel() * 4
    assert bool(whole.isfinite().all()) and bool(whole.any())
    launched: list[int] = []
    type(body)(body.name, body.size, launched.append).run(2 * UNITS + 3)
    assert launched == [UNITS, UNITS, 3]
