"""Overlap on GPUs, measured: what a split step hides there, and what splitting costs where there is nothing to hide.

A step of 16,384 tokens per rank of Qwen3-30B-A3B, 16 of its 48 layers: 10 GB of weights on each of two cards. With half
as many tokens, a slow host needs longer to launch the kernels of two lanes than an H100 needs to run them, and then the
host is measured instead of overlap. A test takes less than a minute.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.overlap import CLAIMS, Claim, measure_steps, until_met

NUM_DEVICES = torch.cuda.device_count()
TRIALS = 2

STEP: dict[str, Any] = {
    "model": "qwen3-30b-a3b",
    "device": "cuda",
    "dtype": "bfloat16",
    "num_layers": 16,
    "tokens": [16384],
}


@pytest.mark.multigpu
@pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA devices")
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("transport", "peer_access"), CLAIMS)
def test_communication_is_hidden(transport: str, peer_access: bool) -> None:
    def unmet() -> list[str]:
        cells = measure_steps(**STEP, transports=[transport], peer_access=peer_access)
        return CLAIMS[transport, peer_access].unmet(cells[transport])

    assert until_met(unmet, trials=TRIALS) == []


@pytest.mark.gpu
@pytest.mark.skipif(NUM_DEVICES < 1, reason="needs a CUDA device")
@pytest.mark.timeout(400)
def test_splitting_costs_little_where_there_is_nothing_to_hide() -> None:
    """On one card; C2 was at most 1.17 times C in steps of half this size."""
    claim = Claim(most_ratio=1.4)

    def unmet() -> list[str]:
        return claim.unmet(measure_steps(**STEP, ranks=1, transports=["local"])["local"])

    assert until_met(unmet, trials=TRIALS) == []
