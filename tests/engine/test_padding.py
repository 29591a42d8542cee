"""A padded step gives the same texts as one without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.comm import RankGroup
from antiphon.core.bundled import bundled_model
from antiphon.kernels.grouped_experts import grouped_experts
from tests.engine.padding_checks import LADDER, ONE_RANK, TWO_RANKS, Outcome, outcomes_of_rank, padded_and_not
from tests.models.twin import random_checkpoint
from tests.support.ranks import run_ranks

PROMPTS = {number: tuple(range(5 + number, 5 + 2 * number + 3)) for number in range(7)}

KINDS: dict[str, dict[str, Any]] = {
    "deepseek-v2": {"num_hidden_layers": 3},  # its router chooses in groups
    "deepseek-v3": {},
    "qwen3-moe": {"num_hidden_layers": 3},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, changes in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        random_checkpoint(made[kind], kind=kind, **changes)
    return made


def check(found: list[dict[str, Any]], dbo: str) -> None:
    plain, padded = found
    assert padded["tokens"] == plain["tokens"]
    assert all(not graph for _, graph, _ in plain["plans"])
    decodes = [(kind, graph, parts) for kind, graph, parts in padded["plans"] if graph]
    assert decodes and len(decodes) < len(padded["plans"]), "prefill steps are not padded, decode steps are"
    if dbo == "on":
        assert any(kind == "dual" for kind, _, _ in decodes)
    for _, graph, parts in decodes:
        longest = max(map(max, parts))
        assert graph == next(size for size in LADDER if size >= longest)
    assert any(graph > min(map(min, parts)) for _, graph, parts in decodes), "no row was padding"
    # Only the first step of every 64 is counted, a prefill; its counts are those of the tokens alone.
    assert padded["expert_tokens"] == plain["expert_tokens"]


@pytest.mark.parametrize("dbo", ["off", "on"])
@pytest.mark.parametrize("kind", ["deepseek-v3", "qwen3-moe"])
def test_one_rank(tmp_path: Path, kind: str, dbo: str) -> None:
    random_checkpoint(tmp_path, kind=kind)
    check(padded_and_not(RankGroup(rank=0, size=1), str(tmp_path), "auto", dbo, [PROMPTS]), dbo)


@pytest.mark.processes
@pytest.mark.parametrize("transport", ["alltoall", pytest.param("allgather", marks=pytest.mark.slow), "shared-memory"])
def test_two_ranks_of_which_one_runs_out_of_work(transport: str) -> None:
    by_rank = [PROMPTS, {number: PROMPTS[number] for number in (1, 2)}]
    found = run_ranks("tests.engine.padding_checks:padded_and_not", 2, str(bundled_model()), transport, "on", by_rank)
    for mine in found:
        plain, padded = mine
        assert padded["tokens"] == plain["tokens"]
        assert any(graph for _, graph, _ in padded["plans"])
    assert found[0][1]["plans"] == found[1][1]["plans"]
    assert any(0 in parts[1] and graph for _, graph, parts in found[0][1]["plans"]), "rank 1 was never idle"


def test_rows_of_padding_cost_no_expert_work() -> None:
    generator = torch.Generator().manual_seed(0)
    x_RD = torch.randn(6, 8, generator=generator)
    gate_up, down = torch.randn(4, 10, 8, generator=generator), torch.randn(4, 8, 5, generator=generator)
    ids_RK = torch.tensor([[0, 1], [2, 3], [1, 3], [-1, -1], [-1, -1], [-1, -1]])
    weights_RK = torch.rand(6, 2, generator=generator)
    x_RD[3:] = float("nan")  # whatever a row of padding holds
    out_RD = grouped_experts(x_RD, ids_RK, weights_RK, gate_up, down)
    assert torch.equal(out_RD[3:], torch.zeros(3, 8))
    assert torch.equal(out_RD[:3], grouped_experts(x_RD[:3], ids_RK[:3], weights_RK[:3], gate_up, down))


# ---- one step, whatever it holds: prompts, texts that decode, dummies, an idle rank


def assert_alike(of_case: list[Outcome]) -> None:
    eager, *padded = of_case
    assert len(padded) == 2
    assert eager.num_pairs
    for outcome in padded:
        assert outcome.num_pairs == eager.num_pairs, "padding was computed"
        assert outcome.expert_load == eager.expert_load, "padding was counted"
        torch.testing.assert_close(outcome.hidden_TD, eager.hidden_TD, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(outcome.cache, eager.cache, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_the_eager_step(folders: dict[str, Path], kind: str) -> None:
    for of_case in outcomes_of_rank(RankGroup(rank=0, size=1), folders[kind], "auto", ONE_RANK):
        assert_alike(of_case)


@pytest.mark.processes
def test_two_ranks_equal_the_eager_step(folders: dict[str, Path]) -> None:
    jobs = [(folder, transport) for folder in folders.values() for transport in ("alltoall", "shared-memory")]
    jobs.append((folders["qwen3-moe"], "allgather"))
    for outcomes_of_jobs in run_ranks("tests.engine.padding_checks:outcomes_of_jobs", 2, jobs):
        for outcomes in outcomes_of_jobs:
            assert len(outcomes) == len(TWO_RANKS)
            for of_case in outcomes:
                assert_alike(of_case)
