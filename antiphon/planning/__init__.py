"""What a step does: the proposal of one rank, and the decision that all ranks make from all proposals."""

from antiphon.planning.agreement import exchange
from antiphon.planning.auto import Conditions, ResolvedPolicy, resolve_policy
from antiphon.planning.decision import decide
from antiphon.planning.planner import Planner

__all__ = ["Conditions", "Planner", "ResolvedPolicy", "decide", "exchange", "resolve_policy"]
