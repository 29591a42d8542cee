"""Host memory that ranks share."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from antiphon.comm import RankGroup
from antiphon.comm.slab.host_memory import share_host_memory


def test_it_can_be_shared_from_a_place_with_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    (memory,) = share_host_memory(RankGroup(rank=0, size=1), 5000, what="a test")
    memory[4999] = 7
    assert memory.sum() == 7
