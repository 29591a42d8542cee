"""The tables of docs/performance.md match the results."""

from __future__ import annotations

from typing import Any

import pytest

from tools.performance_tables import BEGIN, DOCUMENT, END, RESULTS, read_results, with_tables

COMMON: dict[str, Any] = {
    "date": "2026-11-22T10:00:00+00:00",
    "devices": ["Some GPU", "Some GPU"],
    "versions": {"python": "3.12.1", "torch": "2.11.0", "nccl": "2.28.9"},
}


def summary(median: float) -> dict[str, float]:
    return {"median": median, "min": median - 0.5, "max": median + 0.5}


TIMES = {"S": 9.0, "C": 5.0, "D": 6.0, "C2": 5.5, "M": 4.0}
OVERLAP: dict[str, Any] = {
    **COMMON,
    "bench": "overlap",
    "options": {"dtype": "bfloat16", "routing": "uniform", "seq_len": 2048, "peer_access": False, "repeats": 10},
    "model": {"name": "some-model", "layers": 48, "moe_layers": 47},
    "results": [
        {
            "tokens": 8192,
            "best_serial": "alltoall",
            "transports": {
                "alltoall": {
                    "ms": {arm: summary(ms) for arm, ms in TIMES.items()},
                    "serial_over_dual": 1.5,
                    "best_serial_over_dual": 1.5,
                    "recovered": 0.75,
                    "overlap_efficiency": None,
                    "roofline_attainment": 0.9167,
                    "host_us_a_layer_and_lane": {"S": 50.4, "D": 60.6},
                }
            },
        }
    ],
}
COMM: dict[str, Any] = {
    **COMMON,
    "bench": "comm",
    "options": {"beside": ["grouped", "dense"], "peer_access": True, "repeats": 10},
    "results": [
        {
            "size_bytes": 4 * 2**20,
            "transport": "copy-engine",
            "exchange_ms": summary(1.0),
            "gigabytes_per_s": 8.39,
            "beside": {"grouped": {"overlap_efficiency": 0.954}},
        }
    ],
}


def test_the_document_says_what_the_results_say() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_tables(text, read_results(RESULTS)) == text, "run python -m tools.performance_tables"


def test_results_become_rows() -> None:
    text = with_tables(f"before\n{BEGIN}\nold\n{END}\nafter\n", {"steps.json": OVERLAP, "exchanges.json": COMM})
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "### steps" in text and "### exchanges" in text
    assert "2 x Some GPU; peer access off; medians of 10; torch 2.11.0; nccl 2.28.9; 2026-11-22" in text
    assert (
        "| 8,192 | alltoall (best S) | 9.00 | 5.00 | 4.00 | 5.50 | 6.00 (5.50 to 6.50) "
        "| 1.50 | 1.50 | 0.75 |  | 0.92 | 50, 61 |"
    ) in text
    assert "| 4M | copy-engine | 1000 (500 to 1500) | 8.39 | 0.95 |  |" in text
    assert with_tables(text, {}) != text


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="tables"):
        with_tables("nothing here", {})
