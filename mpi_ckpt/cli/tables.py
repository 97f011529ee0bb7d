# SPDX-License-Identifier: Apache-2.0
"""Lays lines and tables out for a terminal of some width; pure, no MPI.

A table that is too wide has its columns moved together, then its names cut in their
middle, then its least needed column left out, and so on. Numbers are never cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from collections.abc import Sequence

_GAP, _NARROW_GAP = 3, 2
# Of a cut name so much is left, before another column is left out for it; of a heading
# that is a name, so much.
_NAME_CELLS, _HEADING_CELLS = 20, 8
_LAST_CELLS = 4
_MARK = "…"
# Tried in turn: names of leaves differ at their beginning, middle or end.
_HEADS = (0.5, 0.7, 0.85, 0.95, 0.3, 0.15, 0.05)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: What stands above it.
        right: Whether it holds numbers.
        names: Whether its cells are names, which may be cut.
        foreign: Whether its heading is a name found in a file.
        spare: How soon it is left out: the highest number first, 0 never.
        states: Whether its cells are states, which have colours.
    """

    heading: str
    right: bool = False
    names: bool = False
    foreign: bool = False
    spare: int = 0
    states: bool = False


@dataclass(frozen=True, slots=True)
class TableLayout:
    """What of a table is shown, and how wide.

    Attributes:
        shown: Places of the columns that are.
        widths: How many cells each of them takes.
        gap: Cells between two columns.
        left_out: Headings of the others.
        heads: Of each, which share of a cut name's rest is its beginning.
    """

    shown: tuple[int, ...]
    widths: tuple[int, ...]
    gap: int
    left_out: tuple[str, ...] = ()
    heads: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """How many cells a row takes."""
        return sum(self.widths) + self.gap * (len(self.widths) - 1)

    def cells(self, columns: Sequence[Column], row: Sequence[str]) -> list[str]:
        """Return the cells of a row, each as wide as its column, cut where need be."""
        cells = []
        heads = self.heads or (_HEADS[0],) * len(self.shown)
        for place, width, head in zip(self.shown, self.widths, heads, strict=True):
            text = cut_middle(row[place], width, head)
            space = " " * (width - cell_len(text))
            cells.append(space + text if columns[place].right else text + space)
        return cells


def lay_out(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None
) -> TableLayout:
    """Choose what of a table is shown.

    Args:
        columns: All of them.
        rows: Their cells.
        width: Cells that there are; None for as many as it takes.
    """
    widest = [
        max((cell_len(row[i]) for row in rows), default=0) for i in range(len(columns))
    ]
    full = [max(w, cell_len(c.heading)) for w, c in zip(widest, columns, strict=True)]
    shown = list(range(len(columns)))
    if width is None:
        return TableLayout(tuple(shown), tuple(full), _GAP)
    # The last of those that are needed least goes first.
    sparable = [i for i in shown if columns[i].spare]
    sparable.sort(key=lambda i: (columns[i].spare, i))
    while True:
        widths = [full[i] for i in shown]
        least = [_least(columns[i], widest[i], full[i]) for i in shown]
        for gap in (_GAP, _NARROW_GAP):
            room = width - gap * (len(shown) - 1)
            if sum(widths) <= room or (gap == _NARROW_GAP and sum(least) <= room):
                break
        else:
            if sparable:
                shown.remove(sparable.pop())
                continue
            least = [
                min(one, _LAST_CELLS) if columns[i].names else one
                for i, one in zip(shown, least, strict=True)
            ]
        widths = _shrink(widths, least, room)
        out = [c.heading for i, c in enumerate(columns) if i not in shown]
        heads = [
            _head([row[i] for row in rows], width) if columns[i].names else _HEADS[0]
            for i, width in zip(shown, widths, strict=True)
        ]
        return TableLayout(tuple(shown), tuple(widths), gap, tuple(out), tuple(heads))


def _least(column: Column, widest: int, full: int) -> int:
    least = min(widest, _NAME_CELLS) if column.names else widest
    heading = cell_len(column.heading)
    return min(
        full, max(least, min(heading, _HEADING_CELLS) if column.foreign else heading)
    )


def _head(names: list[str], width: int) -> float:
    """Return where to cut names, so that as many as can be still differ."""
    cut = list({name for name in names if cell_len(name) > width})
    if len(cut) < 2:
        return _HEADS[0]
    return max(
        _HEADS, key=lambda head: len({cut_middle(name, width, head) for name in cut})
    )


def _shrink(widths: list[int], least: list[int], room: int) -> list[int]:
    """Take cells from the widest columns that can spare some, until all fit."""
    widths = [min(w, max(one, room)) for w, one in zip(widths, least, strict=True)]
    while sum(widths) > room:
        able = [i for i, width in enumerate(widths) if width > least[i]]
        if not able:
            break
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def cut_middle(text: str, width: int, head: float = 0.5) -> str:
    """Return text in at most so many cells, with a mark where its middle is missing.

    Args:
        text: One line.
        width: Cells that there are.
        head: Which share of what is left is its beginning.
    """
    if cell_len(text) <= width:
        return text
    room = width - cell_len(_MARK)
    if room < 2:
        return set_cell_size(text, max(width, 0)).rstrip()
    before = min(room - 1, math.ceil(room * head))
    start = set_cell_size(text, before).rstrip()
    # Cut from the end by cells: the text is turned round, cut, and turned back.
    end = set_cell_size(text[::-1], room - before).rstrip()[::-1]
    return start + _MARK + end


def wrap_words(text: str, width: int | None) -> list[str]:
    """Return lines of at most so many cells, broken at spaces alone.

    A word that is wider, such as a path, is left whole: so it can be copied. Lines after
    the first stand as far in as the first, and two cells more.
    """
    if width is None or cell_len(text) <= width:
        return [text]
    start = text[: len(text) - len(text.lstrip(" "))]
    lines, line = [], start
    for word in text.split(" "):
        joined = f"{line} {word}" if line.strip() else line + word
        if cell_len(joined) > width and line.strip():
            lines.append(line)
            line = start + "  " + word
        else:
            line = joined
    return [*lines, line]
