"""The former name of `antiphon.accuracy.lm_eval`: `python -m antiphon.bench.lm_eval` still works."""

from antiphon.accuracy.lm_eval import *  # noqa: F403
from antiphon.accuracy.lm_eval import main

if __name__ == "__main__":
    main()
