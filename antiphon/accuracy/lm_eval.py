"""The command of lm_eval, with the model type `antiphon` and the task `word_problems` added to its own.

    python -m antiphon.accuracy.lm_eval --model antiphon --model_args ranks=2,dbo=on --tasks word_problems

Its options are those of lm_eval. docs/accuracy.md has more commands.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import antiphon
from antiphon.core.errors import AntiphonError, OptionError

TASKS = Path(antiphon.__file__).parent / "data" / "lm_eval"
"""The folder of the task, for `--include_path`."""


def main() -> None:
    """Run lm_eval's command with the arguments of this process. Antiphon's errors become one line on stderr."""
    try:
        if find_spec("lm_eval") is None:
            raise OptionError("lm_eval is not installed", remedy="pip install 'antiphon[eval]'")
        import_module("antiphon.accuracy.lm_eval_model")  # registers the model type
        if len(sys.argv) > 2 and not any(word.partition("=")[0] == "--include_path" for word in sys.argv):
            sys.argv += ["--include_path", str(TASKS)]
        import_module("lm_eval.__main__").cli_evaluate()
    except AntiphonError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


if __name__ == "__main__":
    main()
