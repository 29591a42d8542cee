"""One thread a process, no model hub, the CPU, and the engines that many tests share: one start serves many checks."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # workers inherit it
os.environ["HF_HUB_OFFLINE"] = "1"
# Hundreds of processes load torch, and where its bytecode may not be kept each of them compiles it first, for seconds.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
os.environ.setdefault("ANTIPHON_DEVICE", "cpu")  # what "auto" is; tests of a GPU say so themselves

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels are tested on the CPU then

from antiphon import LLM
from antiphon.launch import LocalLauncher
from antiphon.launch.local import LocalRanks
from tests.support.warm_ranks import warm

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def warm_ranks() -> Iterator[None]:
    """Ranks that tests start have torch loaded already; tests of starting itself take `cold_ranks`."""
    if torch.cuda.is_available():
        yield  # no fork beside the driver
    else:
        with warm():
            yield


@pytest.fixture
def cold_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks start as those of users do."""
    monkeypatch.setattr(LocalLauncher, "prepare", lambda self, size, *, prefix="antiphon-": LocalRanks(size, prefix))


@pytest.fixture(scope="session")
def one_rank() -> Iterator[LLM]:
    with LLM(ranks=1) as llm:
        yield llm


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[LLM]:
    with LLM(ranks=2, transport="alltoall", debug_order=True) as llm:
        yield llm
