"""Draw the rooms of the package from its imports: `python tools/draw_rooms.py` writes docs/rooms.svg.

A box is a folder of `antiphon/` with the first sentence of its `__init__.py`. An arrow means "imports". Arrows
that follow from others are omitted (transitive reduction), because they would hide the structure.
"""

from __future__ import annotations

import ast
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "rooms.svg"

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 232, 70, 22, 32, 16
PASS_WIDTH = 30  # of an arrow that passes a row
LINE_LENGTH = 38
SWEEPS = 12

Imports = dict[str, set[str]]


def room_imports() -> Imports:
    """Which rooms each room imports, ignoring modules that only keep a former name."""
    graph = grimp.build_graph("antiphon")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    former_names = {entry for contract in contracts for entry in contract.get("ignore_imports", ())}
    rooms = sorted(path.parent.name for path in (ROOT / "antiphon").glob("*/__init__.py"))
    found: Imports = {room: set() for room in rooms}
    for module in graph.modules:
        for target in graph.find_modules_directly_imported_by(module):
            here, there = (name.split(".")[1:2] for name in (module, target))
            known = here and there and here != there and here[0] in rooms and there[0] in rooms
            if known and f"{module} -> {target}" not in former_names:
                found[here[0]].add(there[0])
    return found


def reduce(imports: Imports) -> Imports:
    """Remove imports that are also a path through other rooms. Raises `ValueError` for a circular import."""

    def below(room: str, path: tuple[str, ...] = ()) -> set[str]:
        if room in path:
            raise ValueError(f"rooms import each other in a circle: {' -> '.join((*path, room))}")
        return set().union(*({other} | below(other, (*path, room)) for other in imports[room]))

    reached = {room: below(room) for room in imports}
    return {
        room: {other for other in others if not any(other in reached[way] for way in others - {other})}
        for room, others in imports.items()
    }


def rows_of(imports: Imports) -> list[list[str]]:
    """Rooms by the length of their longest path down, the highest first."""

    def height(room: str) -> int:
        return max((height(other) + 1 for other in imports[room]), default=0)

    heights = {room: height(room) for room in imports}
    return [
        sorted(room for room in imports if heights[room] == level) for level in range(max(heights.values()), -1, -1)
    ]


def with_passes(rows: list[list[str]], imports: Imports) -> tuple[list[list[str]], list[list[str]]]:
    """Rows with a place for every arrow that passes them, named `from>to>row`, and the paths of all arrows."""
    row_of = {room: number for number, row in enumerate(rows) for room in row}
    full = [list(row) for row in rows]
    ways = []
    for room, others in sorted(imports.items()):
        for other in sorted(others):
            passed = range(row_of[room] + 1, row_of[other])
            names = [f"{room}>{other}>{number}" for number in passed]
            for number, name in zip(passed, names, strict=True):
                full[number].append(name)
            ways.append([room, *names, other])
    return full, ways


def centres(rows: list[list[str]], ways: Iterable[list[str]]) -> dict[str, float]:
    """The horizontal centre of each place: rows are sorted by the mean of their neighbors, alternating up and down."""
    neighbors: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for way in ways:
        for first, second in pairwise(way):
            neighbors[first].append(second)
            neighbors[second].append(first)
    place = _spread(rows)
    for sweep in range(SWEEPS):
        above_first = sweep % 2 == 0
        for number, row in list(enumerate(rows))[:: 1 if above_first else -1]:
            side = set(rows[number - 1] if above_first else rows[(number + 1) % len(rows)])

            def mean(name: str, side: set[str] = side) -> float:
                beside = [place[other] for other in neighbors[name] if other in side]
                return sum(beside) / len(beside) if beside else place[name]

            row.sort(key=mean)
            place.update(_spread([row]))
    return place


def _spread(rows: list[list[str]]) -> dict[str, float]:
    place = {}
    for row in rows:
        widths = [BOX_WIDTH if ">" not in name else PASS_WIDTH for name in row]
        x = -(sum(widths) + GAP_X * (len(row) - 1)) / 2
        for name, width in zip(row, widths, strict=True):
            place[name] = x + width / 2
            x += width + GAP_X
    return place


def purpose(room: str) -> str:
    """The first sentence of the room's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / "antiphon" / room / "__init__.py").read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".").replace("`", "")


def draw(imports: Imports) -> str:
    """The picture as SVG."""
    arrows = reduce(imports)
    rows, ways = with_passes(rows_of(imports), arrows)
    place = centres(rows, ways)
    row_of = {name: number for number, row in enumerate(rows) for name in row}
    left, right = min(place.values()) - BOX_WIDTH / 2, max(place.values()) + BOX_WIDTH / 2
    width, height = right - left + 2 * MARGIN, len(rows) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN

    def x(name: str) -> float:
        return place[name] - left + MARGIN

    def top(name: str) -> float:
        return row_of[name] * (BOX_HEIGHT + GAP_Y) + MARGIN

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="system-ui, sans-serif">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#7a869a"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    for way in ways:
        points = [(x(way[0]), top(way[0]) + BOX_HEIGHT)]
        for name in way[1:-1]:
            points += [(x(name), top(name)), (x(name), top(name) + BOX_HEIGHT)]
        points.append((x(way[-1]), top(way[-1])))
        path = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
        for (x1, y1), (x2, y2) in pairwise(points):
            middle = (y1 + y2) / 2
            path += f" C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
        parts.append(f'<path d="{path}" fill="none" stroke="#7a869a" stroke-width="1.3" marker-end="url(#arrow)"/>')
    for room in imports:
        parts.append(
            f'<rect x="{x(room) - BOX_WIDTH / 2:.0f}" y="{top(room):.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" '
            'rx="7" fill="#eef3fb" stroke="#4a6fa5"/>'
            f'<text x="{x(room):.0f}" y="{top(room) + 19:.0f}" text-anchor="middle" font-size="14" font-weight="600" '
            f'fill="#1d2b45">{escape(room)}</text>'
        )
        for number, line in enumerate(textwrap.wrap(purpose(room), LINE_LENGTH, max_lines=3, placeholder=" ...")):
            parts.append(
                f'<text x="{x(room):.0f}" y="{top(room) + 34 + 13 * number:.0f}" text-anchor="middle" font-size="11" '
                f'fill="#3b4a63">{escape(line)}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def main(arguments: Sequence[str]) -> int:
    picture = draw(room_imports())
    if "--check" in arguments:
        if PICTURE.read_text() == picture:
            return 0
        print(f"{PICTURE} does not match the imports; run tools/draw_rooms.py", file=sys.stderr)
        return 1
    PICTURE.write_text(picture)
    print(f"wrote {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
