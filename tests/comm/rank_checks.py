"""All checks that need ranks, in one table, and the function that runs the whole table on every rank of a group.

outcomes = run_ranks("tests.comm.rank_checks:run_checks", 2, str(folder))[rank]  # {check: problem or ""}
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from antiphon.comm import RankGroup
from antiphon.runtime import find_device
from tests.comm import agreement_checks, contract_checks, simulated_checks
from tests.comm.world import DTYPES, World

__all__ = ["checks_of", "run_checks"]

Check = Callable[[World], None]

_PLAIN_CHECKS = (
    contract_checks.results_belong_to_the_caller,
    contract_checks.result_is_not_the_partial_sums,
    contract_checks.sources_are_read_in_dispatch,
    contract_checks.sources_stay_as_they_are,
    contract_checks.ranks_drift_apart,
    contract_checks.rows_are_what_was_sent,
    contract_checks.padding_goes_nowhere,
    contract_checks.messages_are_counted,
    contract_checks.phases_alternate,
    contract_checks.lanes_beyond_the_last_are_refused,
    contract_checks.wrong_tokens_are_refused,
    contract_checks.wrong_partial_sums_are_refused,
    contract_checks.reset_forgets_a_failed_run,
)

_AGREEMENT_CHECKS = (
    agreement_checks.proposals_are_the_same_everywhere,
    agreement_checks.different_policies_are_refused,
    agreement_checks.policies_may_differ_while_a_message_is_under_way,
    agreement_checks.different_orders_are_named,
    agreement_checks.a_missing_collective_is_named,
    agreement_checks.an_order_recorded_by_some_ranks_only_is_refused,
    agreement_checks.equal_orders_have_equal_fingerprints,
)


def checks_of(size: int, kind: str = "cpu") -> dict[str, Check]:
    """Every check for `size` ranks, by the name of its transport and variant."""
    checks: dict[str, Check] = {}
    for transport in contract_checks.transports_of(size, kind):
        checks |= _contract_of(transport)
    if size > 1 and kind == "cpu":
        for transport in ("allgather", "alltoall"):
            check = partial(simulated_checks.communications_queue_on_the_link, name=transport)
            checks[f"simulated:{transport}/communications_queue_on_the_link"] = check
        checks |= {f"agreement/{check.__name__}": check for check in _AGREEMENT_CHECKS}
    return checks


def _contract_of(name: str) -> dict[str, Check]:
    checks: dict[str, Check] = {}
    for label, dtype in DTYPES.items():
        for title, scenario in contract_checks.SCENARIOS.items():
            check = partial(contract_checks.sums_are_right, name=name, scenario=scenario, dtype=dtype)
            checks[f"{name}/sums_are_right/{title}/{label}"] = check
        check = partial(contract_checks.bytes_are_counted, name=name, dtype=dtype)
        checks[f"{name}/bytes_are_counted/{label}"] = check
        if name in contract_checks.SLAB_TRANSPORTS:
            checks[f"{name}/sums_are_exact/{label}"] = partial(contract_checks.sums_are_exact, name=name, dtype=dtype)
    for num_lanes in (1, 2, 3):
        check = partial(contract_checks.lanes_interleave, name=name, num_lanes=num_lanes)
        checks[f"{name}/lanes_interleave/{num_lanes}"] = check
    num_iterations = 50 if name == "local" or name.startswith("simulated") else 120
    check = partial(contract_checks.buffers_are_written_before_they_are_read, name=name, num_iterations=num_iterations)
    checks[f"{name}/buffers_are_written_before_they_are_read"] = check
    return checks | {f"{name}/{check.__name__}": partial(check, name=name) for check in _PLAIN_CHECKS}


def run_checks(group: RankGroup, folder: str, kind: str = "cpu", only: str = "") -> dict[str, str]:
    """Run all checks on this rank, and return the problems that each one found, or an empty text.

    A check that raises leaves the ranks out of step, so they reconnect before the next one.
    """
    outcomes: dict[str, str] = {}
    device = find_device(kind, group.rank)
    device.activate()
    streams = device.streams()
    checks = {name: check for name, check in checks_of(group.size, kind).items() if name.startswith(only)}
    for number, (name, check) in enumerate(checks.items()):
        world = World(group, streams)
        try:
            check(world)
            world.barrier()
        except Exception:
            world.problems.append(traceback.format_exc())
            group = _meet_again(group, Path(folder) / f"again-{number}")
        outcomes[name] = "\n".join(world.problems)
    group.close()
    return outcomes


def _meet_again(group: RankGroup, place: Path) -> RankGroup:
    group.close()
    return RankGroup.connect(rank=group.rank, size=group.size, init_method=f"file://{place}", timeout_s=group.timeout_s)
