"""The formulas, on made-up times for which the right answer is obvious."""

from __future__ import annotations

import pytest

from antiphon.bench.measures import (
    StepTimes,
    Summary,
    gigabytes_per_s,
    overlap_efficiency,
    slowest_rank,
    step_figures,
)


@pytest.mark.parametrize(
    ("compute", "communication", "both", "efficiency"),
    [
        (10.0, 4.0, 10.0, 1.0),  # hidden behind the computation
        (4.0, 10.0, 10.0, 1.0),  # the other way round
        (10.0, 4.0, 14.0, 0.0),  # one after the other
        (10.0, 4.0, 12.0, 0.5),
        (10.0, 4.0, 16.0, -0.5),  # slower than one after the other
        (10.0, 4.0, 9.0, 1.25),
    ],
)
def test_overlap_efficiency(compute: float, communication: float, both: float, efficiency: float) -> None:
    assert overlap_efficiency(compute, communication, both) == pytest.approx(efficiency)


def test_without_communication_there_is_no_efficiency() -> None:
    assert overlap_efficiency(10.0, 0.0, 10.0) is None


def test_figures_of_a_step() -> None:
    # What the document of measured facts has for two GPUs without peer access.
    figures = step_figures(StepTimes(S=26.2, C=15.6, C2=17.0, M=11.5, D=18.8), best_serial=25.0)
    assert figures["serial_over_dual"] == pytest.approx(1.394, abs=1e-3)
    assert figures["best_serial_over_dual"] == pytest.approx(25.0 / 18.8)
    assert figures["split_penalty_ms"] == pytest.approx(1.4)
    assert figures["excess_ms"] == pytest.approx(1.8)
    assert figures["recovered"] == pytest.approx(7.4 / 10.6)
    assert figures["overlap_efficiency"] == pytest.approx(0.843, abs=1e-3)
    assert figures["roofline_attainment"] == pytest.approx(0.904, abs=1e-3)


def test_attainment_is_of_the_longer_one() -> None:
    figures = step_figures(StepTimes(S=30, C=9, C2=10, M=20, D=25), best_serial=30)
    assert figures["roofline_attainment"] == pytest.approx(0.8)
    assert figures["excess_ms"] == pytest.approx(5)


def test_nothing_to_recover_is_no_figure() -> None:
    assert step_figures(StepTimes(S=10, C=10, C2=11, M=1, D=11), best_serial=10)["recovered"] is None


def test_a_step_lasts_as_long_as_its_slowest_rank() -> None:
    assert slowest_rank([[1.0, 5.0, 3.0], [2.0, 4.0, 3.5]]) == [2.0, 5.0, 3.5]
    with pytest.raises(ValueError):
        slowest_rank([[1.0, 2.0], [1.0]])


def test_summary() -> None:
    assert Summary.of([3.0, 1.0, 2.0, 10.0]) == Summary(2.5, 1.0, 10.0)


def test_gigabytes_are_of_ten_to_the_nine() -> None:
    assert gigabytes_per_s(256 * 2**20, 1.0) == pytest.approx(268.4, abs=0.1)
