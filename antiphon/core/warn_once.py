"""Warnings about slow paths: the result is right, but slower than it could be, and nobody would notice.

    warn_once("the experts run one by one", cost="the host waits in every layer", remedy="use bfloat16")

Worker processes forward these warnings to the frontend, which logs each of them once (`engine.worker`).
"""

from __future__ import annotations

import logging
from functools import lru_cache

logger = logging.getLogger("antiphon")

_MOST_REMEMBERED = 256


@lru_cache(maxsize=_MOST_REMEMBERED)
def warn_once(fact: str, *, cost: str, remedy: str) -> None:
    """Log `fact: cost; remedy` as a warning, once per process.

    The texts must not contain anything that changes from step to step, such as token counts.
    """
    logger.warning("%s: %s; %s", fact, cost, remedy)
