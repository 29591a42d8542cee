"""Warnings of slow paths: a result is right but slower than it could be, and nobody would notice.

    warn_once("the experts run one by one", cost="the host waits in every layer", remedy="use bfloat16")

Ranks in processes of their own hand such warnings to the front, which says each of them once (`engine.worker`).
"""

from __future__ import annotations

import logging
from functools import lru_cache

logger = logging.getLogger("antiphon")

_MOST_REMEMBERED = 256


@lru_cache(maxsize=_MOST_REMEMBERED)
def warn_once(fact: str, *, cost: str, remedy: str) -> None:
    """Log `fact: cost; remedy` as a warning the first time that this process says it.

    The texts must not hold what changes from step to step, such as numbers of tokens.
    """
    logger.warning("%s: %s; %s", fact, cost, remedy)
