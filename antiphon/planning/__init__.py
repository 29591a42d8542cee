"""What a step does: the proposal of one rank, and the decision that all ranks make from all proposals."""

from antiphon.planning.agreement import exchange
from antiphon.planning.auto import Conditions, SettledPolicy, settle_policy
from antiphon.planning.decision import decide
from antiphon.planning.planner import Planner

__all__ = ["Conditions", "Planner", "SettledPolicy", "decide", "exchange", "settle_policy"]
