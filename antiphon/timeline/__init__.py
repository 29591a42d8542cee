"""What happened in a step: the recording of its events, and the overlap computed from them."""

from antiphon.timeline.overlap import OverlapTotals, StepOverlap, StepTimeline, measure_overlap
from antiphon.timeline.recorder import StepRecorder

__all__ = ["OverlapTotals", "StepOverlap", "StepRecorder", "StepTimeline", "measure_overlap"]
