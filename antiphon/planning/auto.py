"""What `dbo="auto"` means until calibration exists: a rule based on the devices and the data path between them.

    one rank                              off: nothing is sent
    GPUs, data goes by peer access        off
    GPUs, data goes through host memory   split from 4,096 tokens on the busiest rank, prefill and decode alike
    CPUs                                  off
    CPUs, the link is simulated           split from 512 tokens in prefill and 32 in decode

Decode steps that are captured are measured when the engine starts (`measured`), and the rule is about prefill alone.

tests/planning/test_resolve_policy.py compares the rule with the better of serial and split, over all step times in
benchmarks/results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from antiphon.comm import DataPath
from antiphon.core.policy import DEFAULT_DECODE_THRESHOLD, DEFAULT_PREFILL_THRESHOLD, MEASURED, NEVER, OverlapPolicy
from antiphon.runtime import find_device

_CUDA_THRESHOLD = 4096
"""Below it, launching two eager lanes is host-bound (docs/performance.md), in decode steps, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The conditions under which steps run, equal on all ranks.

    device_kind: a kind of device. decode_measured: whether captured decode steps of both plans were measured.
    """

    device_kind: str
    data_path: DataPath
    decode_measured: bool = False


@dataclass(frozen=True, slots=True)
class ResolvedPolicy:
    """A policy with every `auto` resolved. cause: why `auto` chose it; "" if the user did."""

    policy: OverlapPolicy
    cause: str = ""

    @property
    def reason(self) -> str:
        """What was chosen and why, in one sentence."""
        if not self.cause:
            return "as asked"
        return f"{'off' if self.policy.dbo == 'off' else self.policy.describe_thresholds()}: {self.cause}"


def resolve_policy(policy: OverlapPolicy, conditions: Conditions) -> ResolvedPolicy:
    """Resolve `auto` for these conditions. Other policies stay unchanged.

    A threshold set by the user applies to its kind of step, prefill or decode, and `auto` decides about the other.
    """
    if policy.dbo != "auto":
        return ResolvedPolicy(policy)
    if conditions.data_path is DataPath.NONE:
        return ResolvedPolicy(replace(policy, dbo="off"), "one rank has no communication to hide")
    prefill, decode, cause = _rule(conditions)
    if conditions.decode_measured:
        decode = MEASURED
    given = {"prefill": policy.prefill_threshold, "decode": policy.decode_threshold}
    asked = [kind for kind, threshold in given.items() if threshold is not None]
    if not asked and prefill == decode == NEVER and not conditions.decode_measured:
        return ResolvedPolicy(replace(policy, dbo="off"), cause)
    resolved = replace(
        policy,
        prefill_threshold=prefill if policy.prefill_threshold is None else policy.prefill_threshold,
        decode_threshold=decode if policy.decode_threshold is None else policy.decode_threshold,
    )
    if len(asked) == 2:
        cause = "as asked"
    elif asked:
        cause = f"{asked[0]} as asked, and {cause}"
    return ResolvedPolicy(resolved, cause)


def _rule(conditions: Conditions) -> tuple[int, int, str]:
    """The thresholds of prefill and decode, and why."""
    is_simulated = conditions.data_path is DataPath.SIMULATED
    device = find_device(conditions.device_kind)
    if device.peer_access:
        if conditions.data_path is DataPath.PEERS:
            return NEVER, NEVER, "peer access is in use, where overlap has not paid"
        where = "the link is simulated" if is_simulated else "data goes through host memory"
        return _CUDA_THRESHOLD, _CUDA_THRESHOLD, f"{where}, where overlap has paid"
    if is_simulated:
        return DEFAULT_PREFILL_THRESHOLD, DEFAULT_DECODE_THRESHOLD, "the link is simulated"
    if device.own_memory:
        return NEVER, NEVER, f"overlap has not been measured on {device.kind}"
    return NEVER, NEVER, "between processes on CPUs communication is too small a part of a step to be worth hiding"
