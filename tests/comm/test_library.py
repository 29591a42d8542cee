"""The library inside programs with their own process group, gradients and default device."""

from __future__ import annotations

import pytest

from tests.comm.library_checks import TRANSPORTS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.processes

OF_TRANSPORTS = {
    "plain": "",
    "counts, list": "",
    "counts, length": "OptionError tokens_by_rank=(5,)",
    "counts, own": "OptionError tokens_by_rank=(6, 6)",
    "counts, most": "OptionError tokens_by_rank=",
    "meta ids": "OptionError x_TD=None",
    "gradient": "OptionError None=None: a tensor requires a gradient",
    "gradient of sums": "OptionError None=None: a tensor requires a gradient",
    "default device": "",
    "lanes": "LaneError None=None: counts of dispatch",
}
OF_GROUPS = {
    "connect": "OptionError init_method=env://",
    "closed": "PeerError None=None: rank ",
    "destroyed": "",
}


@pytest.fixture(scope="module")
def said_by_rank() -> list[dict[str, str]]:
    return run_ranks("tests.comm.library_checks:be_a_program", 2, connect=False)


@pytest.mark.parametrize(
    ("what", "begin"),
    [*OF_GROUPS.items(), *((f"{name}: {what}", begin) for name in TRANSPORTS for what, begin in OF_TRANSPORTS.items())],
)
def test_every_use_works_or_is_refused_in_one_line(said_by_rank: list[dict[str, str]], what: str, begin: str) -> None:
    for said in said_by_rank:
        assert said[what].startswith(begin) if begin else said[what] == ""
