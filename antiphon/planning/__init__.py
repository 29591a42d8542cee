"""Decides what a step does: `Planner.agree` returns the same plan on all ranks.

`resolve_policy` says what `dbo="auto"` means on this machine.
"""

from antiphon.planning.agreement import exchange
from antiphon.planning.auto import Conditions, ResolvedPolicy, resolve_policy
from antiphon.planning.decision import decide
from antiphon.planning.measured import MeasuredDecode
from antiphon.planning.planner import Planner

__all__ = ["Conditions", "MeasuredDecode", "Planner", "ResolvedPolicy", "decide", "exchange", "resolve_policy"]
