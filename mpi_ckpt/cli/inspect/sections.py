# SPDX-License-Identifier: Apache-2.0
"""Cuts the tiles of an array into plane sections, and draws a section as text. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.decomposition.boxes import Box

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

_SECTIONS_MAX = 4
_CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
SYMBOLS = len(_CHARACTERS)
"""Number of files that `symbol` tells apart."""

_CELLS_OF_ELEMENT_MAX = 8
_ELSEWHERE = -1


@dataclass(frozen=True, slots=True)
class Section:
    """A plane through the tiles of an array; of an array of one dimension, its only row.

    Attributes:
        title: Which part of the array it shows.
        shape: Lengths of both dimensions, in elements: down and across.
        tiles: Box in the plane, and number of the file, of each tile that it meets.
    """

    title: str
    shape: tuple[int, int]
    tiles: tuple[tuple[Box, int], ...]


def sections_of(shape: tuple[int, ...], tiles: Sequence[tuple[Box, int]]) -> list[Section]:
    """Return the sections that show how an array of one to three dimensions is cut.

    An array of three dimensions is divided along the dimension with the fewest different
    sections; at most four sections are shown.

    Args:
        shape: The array's lengths, in elements.
        tiles: Box and number of the file of each tile.

    Returns:
        The sections; none for an array without elements, without dimensions or with more
        than three.
    """
    if 0 in shape or not 1 <= len(shape) <= 3:
        return []
    if len(shape) == 1:
        rows = [(Box((0, *box.offset), (1, *box.shape)), file) for box, file in tiles]
        return [Section(f"elements 0:{shape[0]}", (1, shape[0]), tuple(rows))]
    if len(shape) == 2:
        title = f"dimension 0 down, 0:{shape[0]}; dimension 1 across, 0:{shape[1]}"
        return [Section(title, (shape[0], shape[1]), tuple(tiles))]
    borders = [_borders(axis, shape, tiles) for axis in range(3)]
    axis = min(range(3), key=lambda one: len(borders[one]))
    ranges = list(zip(borders[axis], borders[axis][1:], strict=False))
    step = -(-len(ranges) // _SECTIONS_MAX)
    return [_section(axis, low, high, shape, tiles) for low, high in ranges[::step]]


def symbol(file: int) -> str:
    """Return the character that stands for a file; characters repeat after ``SYMBOLS``."""
    return "." if file == _ELSEWHERE else _CHARACTERS[file % SYMBOLS]


def draw(section: Section, width: int, height: int) -> list[str]:
    """Draw a section as lines in a frame, with the file's symbol for each tile.

    Elements in no tile are points: they are on other hosts.

    Args:
        section: The section.
        width: Largest number of characters of a line, without the frame.
        height: Largest number of lines, without the frame.
    """
    rows, columns = section.shape
    # Characters are about twice as high as they are wide.
    most = _CELLS_OF_ELEMENT_MAX if rows == 1 else 2
    across = min(width, columns * max(1, min(most, width // columns)))
    cells = np.full((min(height, rows), across), _ELSEWHERE, np.int64)
    down_at, across_at = _samples(rows, len(cells)), _samples(columns, across)
    for box, file in section.tiles:
        top, bottom = np.searchsorted(down_at, (box.offset[0], box.end[0]))
        left, right = np.searchsorted(across_at, (box.offset[1], box.end[1]))
        cells[top:bottom, left:right] = file
    lines = ["│" + "".join(symbol(file) for file in row) + "│" for row in cells.tolist()]
    return [f"┌{'─' * across}┐", *lines, f"└{'─' * across}┘"]


def _samples(length: int, cells: int) -> Numbers:
    """Return the index of the element in the middle of each cell."""
    middles: Numbers = ((2 * np.arange(cells) + 1) * length) // (2 * cells)
    return middles


def _borders(
    axis: int, shape: tuple[int, ...], tiles: Sequence[tuple[Box, int]]
) -> list[int]:
    ends = {box.end[axis] for box, _ in tiles}
    return sorted({0, shape[axis]} | ends | {box.offset[axis] for box, _ in tiles})


def _section(
    axis: int,
    low: int,
    high: int,
    shape: tuple[int, ...],
    tiles: Sequence[tuple[Box, int]],
) -> Section:
    down, across = (one for one in range(3) if one != axis)
    met = [
        (Box((o[down], o[across]), (n[down], n[across])), file)
        for (o, n), file in tiles
        if o[axis] <= low < o[axis] + n[axis]
    ]
    title = (
        f"dimension {axis} at {low}:{high}; dimension {down} down, 0:{shape[down]}; "
        f"dimension {across} across, 0:{shape[across]}"
    )
    return Section(title, (shape[down], shape[across]), tuple(met))
