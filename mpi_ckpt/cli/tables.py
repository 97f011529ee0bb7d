# SPDX-License-Identifier: Apache-2.0
"""Lays out lines and tables for the width of a terminal; pure, no MPI.

If a table is too wide, its columns move together, then its names are cut in the middle,
then its least needed column is left out, and so on. Numbers are never cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from collections.abc import Sequence

_GAP, _NARROW_GAP = 3, 2
# Least cells of a cut name, before another column is left out for it; least cells of a
# heading that is a name.
_NAME_CELLS, _HEADING_CELLS = 20, 8
_LAST_CELLS = 4
_MARK = "…"
# Tried in this order: names of leaves differ at their beginning, middle or end.
_HEADS = (0.5, 0.7, 0.85, 0.95, 0.3, 0.15, 0.05)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: Its heading.
        right: Whether it is right-aligned, for numbers.
        names: Whether its cells are names, which may be cut.
        foreign: Whether its heading is a name from a file.
        spare: Order in which it is left out: the highest number first, 0 never.
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
    """The visible parts of a table, and their widths.

    Attributes:
        shown: Indices of the visible columns.
        widths: Width of each in cells.
        gap: Cells between two columns.
        left_out: Headings of the other columns.
        heads: For each, the share of a cut name's rest that is its beginning.
    """

    shown: tuple[int, ...]
    widths: tuple[int, ...]
    gap: int
    left_out: tuple[str, ...] = ()
    heads: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Width of a row in cells."""
        return sum(self.widths) + self.gap * (len(self.widths) - 1)

    def cells(self, columns: Sequence[Column], row: Sequence[str]) -> list[str]:
        """Return the cells of a row, each as wide as its column, cut if necessary."""
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
    """Choose the visible parts of a table.

    Args:
        columns: All columns.
        rows: Their cells.
        width: Available cells; None for no limit.
    """
    widest = [
        max((cell_len(row[i]) for row in rows), default=0) for i in range(len(columns))
    ]
    full = [max(w, cell_len(c.heading)) for w, c in zip(widest, columns, strict=True)]
    shown = list(range(len(columns)))
    if width is None:
        return TableLayout(tuple(shown), tuple(full), _GAP)
    # The last of the least needed columns goes first.
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
                min(minimum, _LAST_CELLS) if columns[i].names else minimum
                for i, minimum in zip(shown, least, strict=True)
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
    """Return where to cut names, so that as many as possible still differ."""
    cut = list({name for name in names if cell_len(name) > width})
    if len(cut) < 2:
        return _HEADS[0]
    return max(
        _HEADS, key=lambda head: len({cut_middle(name, width, head) for name in cut})
    )


def _shrink(widths: list[int], least: list[int], room: int) -> list[int]:
    """Shrink the widest columns that can shrink, until all fit."""
    widths = [min(w, max(minimum, room)) for w, minimum in zip(widths, least, strict=True)]
    while sum(widths) > room:
        able = [i for i, width in enumerate(widths) if width > least[i]]
        if not able:
            break
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def cut_middle(text: str, width: int, head: float = 0.5) -> str:
    """Return text of at most ``width`` cells, with a mark in place of a cut middle.

    Args:
        text: One line.
        width: Available cells.
        head: The share of the rest that is its beginning.
    """
    if cell_len(text) <= width:
        return text
    room = width - cell_len(_MARK)
    if room < 2:
        return set_cell_size(text, max(width, 0)).rstrip()
    before = min(room - 1, math.ceil(room * head))
    start = set_cell_size(text, before).rstrip()
    # Cut from the end by cells: reverse the text, cut it, and reverse it again.
    end = set_cell_size(text[::-1], room - before).rstrip()[::-1]
    return start + _MARK + end


def wrap_words(text: str, width: int | None) -> list[str]:
    """Return lines of at most ``width`` cells, broken only at spaces.

    A wider word, such as a path, is left whole, so that it can be copied. Lines after the
    first are indented by two more cells than the first.
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
