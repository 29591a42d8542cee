"""Which kernels compute how many rows, the buffers that they share, and the promise not to grow."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("triton")

from antiphon.kernels import expert_choice
from antiphon.kernels.expert_choice import DEFAULT_SMALL_ROWS, ExpertChoice, Timing
from antiphon.kernels.expert_tuning import reserve_experts, tune_experts
from antiphon.kernels.fused import experts as fused_experts
from antiphon.kernels.fused.experts import grouped_experts_fused
from antiphon.kernels.grouped_experts import ExpertWorkspace

CPU = torch.device("cpu")


class OnGpu(torch.Tensor):
    """Looks as if it were on a GPU."""

    is_cuda = True


def rows(num_rows: int, dtype: torch.dtype = torch.bfloat16, hidden: int = 64, *, gpu: bool = True) -> torch.Tensor:
    x_RD = torch.zeros(num_rows, hidden, dtype=dtype)
    return x_RD.as_subclass(OnGpu) if gpu else x_RD


@pytest.mark.parametrize(
    ("dtype", "hidden", "major", "expected"),
    [
        (torch.bfloat16, 64, 9, DEFAULT_SMALL_ROWS),
        (torch.bfloat16, 64, 10, DEFAULT_SMALL_ROWS),
        (torch.bfloat16, 64, 8, None),
        (torch.bfloat16, 64, 12, None),
        (torch.bfloat16, 63, 9, None),
        (torch.float16, 64, 9, None),
        (torch.float32, 64, 9, 4096),
        (torch.float64, 64, 9, 0),
        (torch.bfloat16, 64, 7, 0),
    ],
)
def test_the_default(
    dtype: torch.dtype, hidden: int, major: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: any number of rows, because grouped products would make the host wait."""
    monkeypatch.setattr(expert_choice, "major_capability", lambda device: major)
    choice = ExpertChoice()
    for num_rows in (1, DEFAULT_SMALL_ROWS, DEFAULT_SMALL_ROWS + 1, 5000):
        taken = choice.takes_small(rows(num_rows, dtype, hidden), 32)
        assert taken == (expected is None or num_rows <= expected)
    assert not ExpertChoice().takes_small(rows(1, dtype, hidden, gpu=False), 32)


@pytest.mark.parametrize(
    ("small", "grouped", "expected"),
    [
        ((10, 20, 30, 90), (20, 30, 40, 50), 128),
        ((10, 20, 30, 40), (20, 30, 40, 50), 256),
        ((30, 20, 30, 40), (20, 30, 40, 50), 0),
        ((10, 40, 30, 40), (20, 30, 40, 50), 32),
    ],
)
def test_measured(
    small: tuple[int, ...], grouped: tuple[int, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the first loss; what was chosen before is forgotten."""
    monkeypatch.setattr(expert_choice, "major_capability", lambda device: 9)
    choice = ExpertChoice()
    assert choice.takes_small(rows(DEFAULT_SMALL_ROWS), 32)
    assert "not measured" in choice.describe()
    timings = [Timing(*sizes) for sizes in zip((32, 64, 128, 256), small, grouped, strict=True)]
    choice.resolve(tuple(timings[::-1]))
    assert choice.small_rows == expected
    for num_rows in (expected, expected + 1):
        assert choice.takes_small(rows(num_rows), 32) == (num_rows <= expected)
    assert f"up to {expected} rows (measured)" in choice.describe()


def test_the_choice_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each pass on its own."""
    calls: list[tuple[str, int]] = []
    for name in ("compute_few", "compute_many"):

        def record(x: torch.Tensor, *args: object, called: str = name, **kwargs: object) -> None:
            calls.append((called, x.shape[0]))

        monkeypatch.setattr(fused_experts, name, record)
    workspace = ExpertWorkspace(max_pairs=20)
    monkeypatch.setattr(ExpertChoice, "takes_small", lambda self, x_RD, width: x_RD.shape[0] <= 5)
    gate_up, down = torch.zeros(2, 8, 4), torch.zeros(2, 4, 4)
    for num_rows in (5, 10, 13):
        ids_RK, weights_RK = torch.zeros(num_rows, 2, dtype=torch.int32), torch.zeros(num_rows, 2)
        grouped_experts_fused(torch.zeros(num_rows, 4), ids_RK, weights_RK, gate_up, down, workspace=workspace)
    assert calls == [("compute_few", 5), ("compute_many", 10), ("compute_many", 10), ("compute_few", 3)]


def test_nothing_is_measured_where_there_is_no_choice() -> None:
    workspace = ExpertWorkspace()
    assert not tune_experts(workspace, torch.zeros(2, 8, 4), torch.zeros(2, 4, 4), num_experts=4, top_k=2)
    assert workspace.choice.timings == ()


# ---- memory


def test_views_that_lie_apart() -> None:
    """They fill what one buffer has, do not overlap, and begin where wide loads may."""
    workspace = ExpertWorkspace()
    views = workspace.get_apart("pairs", ((3, 5), (7,), (2, 2)), torch.float32, CPU)
    assert [view.shape for view in views] == [(3, 5), (7,), (2, 2)]
    for number, view in enumerate(views):
        view.fill_(number)
        assert (view.data_ptr() - views[0].data_ptr()) % 16 == 0
    assert [view.unique().tolist() for view in views] == [[0], [1], [2]]
    assert workspace.get_apart("pairs", ((3, 5), (7,), (2, 2)), torch.float32, CPU) is views
    assert workspace.get("pairs", (4,), torch.float32, CPU).data_ptr() == views[0].data_ptr()
    grown = workspace.get("pairs", (4000,), torch.float32, CPU)
    assert workspace.get_apart("pairs", ((3, 5), (7,)), torch.float32, CPU)[0].data_ptr() == grown.data_ptr()


def test_a_frozen_workspace_keeps_what_graphs_use(caplog: pytest.LogCaptureFixture) -> None:
    workspace = ExpertWorkspace()
    before = workspace.get("pairs", (40,), torch.float32, CPU)
    workspace.freeze()
    assert workspace.get("pairs", (4, 9), torch.float32, CPU).data_ptr() == before.data_ptr()
    held, address = workspace.num_bytes, before.data_ptr()
    before.fill_(3)
    del before  # as a captured graph, which holds the address only
    with caplog.at_level(logging.WARNING):
        larger = workspace.get("pairs", (41,), torch.float32, CPU)
    assert larger.data_ptr() != address and "had reserved 160" in caplog.text
    assert workspace.num_bytes == held + larger.nbytes, "what graphs use stays allocated"
    assert workspace._retired[0].data_ptr() == address and workspace._retired[0].eq(3).all()
    assert workspace.get("places", (1,), torch.int32, CPU).numel() == 1


@pytest.mark.parametrize("small_rows", [0, 12, 500])
def test_reserved_memory_is_enough_for_all_smaller_batches(small_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are interpreted here, and chosen as on a GPU."""
    monkeypatch.setattr(ExpertChoice, "_limit", lambda self, x_RD, width: self.small_rows)
    monkeypatch.setattr("antiphon.kernels.expert_tuning.grouped_experts", grouped_experts_fused)
    monkeypatch.setattr("antiphon.kernels.expert_tuning.takes_cuda_kernels", lambda tensor: True)
    workspace = ExpertWorkspace()
    workspace.choice.set_small_rows(small_rows)
    gate_up, down = torch.randn(3, 16, 8), torch.randn(3, 8, 8)
    reserve_experts(workspace, 30, gate_up, down, top_k=2)
    assert workspace.choice.small_rows == small_rows
    workspace.freeze()
    for num_rows in (30, 1, 12, 13, 29):
        ids_RK = torch.arange(2, dtype=torch.int32).repeat(num_rows, 1)
        grouped_experts_fused(
            torch.randn(num_rows, 8), ids_RK, torch.ones(num_rows, 2), gate_up, down, workspace=workspace
        )
    assert not workspace._retired
    grouped_experts_fused(
        torch.randn(50, 8), ids_RK[:1].repeat(50, 1), torch.ones(50, 2), gate_up, down, workspace=workspace
    )
    assert workspace._retired, "more rows than were reserved"
