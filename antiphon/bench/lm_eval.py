"""The former name of `antiphon.accuracy.lm_eval`: `python -m antiphon.bench.lm_eval` still works."""

from antiphon.accuracy.lm_eval import TASKS as TASKS
from antiphon.accuracy.lm_eval import main as main

if __name__ == "__main__":
    main()
