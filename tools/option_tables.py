"""Write the tables of options in docs/options.md from their declarations.

python -m tools.option_tables            # rewrite docs/options.md
python -m tools.option_tables --check    # exit code 1 if it does not match the declarations
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from antiphon.config.options import OPTIONS
from antiphon.core.options import Option

DOCUMENT = Path(__file__).parents[1] / "docs/options.md"
END = "<!-- end of options -->"
HEAD = "| option | command line | default | meaning |\n| --- | --- | --- | --- |\n"


def main(arguments: Sequence[str]) -> int:
    text = DOCUMENT.read_text(encoding="utf-8")
    new = with_tables(text)
    if "--check" in arguments:
        return int(new != text)
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


def with_tables(text: str) -> str:
    """The document with the table of each group between its markers."""
    for group in dict.fromkeys(one.group for one in OPTIONS.values()):
        begin = f"<!-- options: {group}, written by tools/option_tables.py -->"
        head, _, rest = text.partition(begin)
        if not rest:
            raise ValueError(f"docs/options.md has no line {begin}")
        text = f"{head}{begin}\n\n{table(group)}\n{END}{rest.partition(END)[2]}"
    return text


def table(group: str) -> str:
    return HEAD + "".join(_row(one) for one in OPTIONS.values() if one.group == group)


def _row(one: Option) -> str:
    flag = one.name.replace("_", "-")
    flags = f"`--{flag}`" + (f", `--no-{flag}`" if isinstance(one.default, bool) else "")
    return f"| `{one.name}` | {flags} | {_default(one)} | {f'{one.help} {one.doc}'.strip()} |\n"


def _default(one: Option) -> str:
    if one.shown_default:
        return one.shown_default
    if isinstance(one.default, float):
        return f"{one.default:g}"
    return str(one.default) if type(one.default) is int else f"`{one.default}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
