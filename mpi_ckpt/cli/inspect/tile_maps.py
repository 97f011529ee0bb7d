# SPDX-License-Identifier: Apache-2.0
"""Shows how a leaf is cut into tiles: as text, as JSON values, as a picture in a file."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.cli.command import CommandError, misused
from mpi_ckpt.cli.new_file import new_file
from mpi_ckpt.cli.plain_text import bytes_text, clean, plural
from mpi_ckpt.cli.tables import Column
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.reading.assembly import state_arrays

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.storage.format.manifest import StoredState
    from mpi_ckpt.storage.reading.assembly import StoredArray
    from mpi_ckpt.storage.reading.reader import GenerationReader
    from mpi_ckpt.storage.reading.tile_index import LeafKey

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


TILES_SHOWN = 40
"""Tiles that are listed unless all are wanted."""

_WIDTH, _HEIGHT = 60, 20
_RANK = re.compile(r"(?:tiles|rank)-(\d+)")
_LEGEND_MAX = 20
_INCHES = 5.0
_CELLS_OF_BOX = (Column("", names=True), Column("tile"), Column("bytes", right=True))


@dataclass(frozen=True, slots=True)
class TileMap:
    """A leaf and the files that it is in.

    Attributes:
        state: Name of its state.
        array: Its tiles.
    """

    state: str
    array: StoredArray

    @property
    def key(self) -> LeafKey:
        """Name of the state, and name of the leaf."""
        return self.state, self.array.spec.name

    @property
    def name(self) -> str:
        """Both names as one text, for messages."""
        return f"{self.state}/{self.array.spec.name}"

    @property
    def files(self) -> dict[str, int]:
        """Name and number of each file with its tiles; its rank where that is clear."""
        names = sorted({tile.leaf.extent.file for tile in self.array.tiles})
        matches = [_RANK.match(name) for name in names]
        ranks = [int(match[1]) for match in matches if match is not None]
        is_clear = len(set(ranks)) == len(names) and max(ranks, default=0) < SYMBOLS
        return dict(zip(names, ranks if is_clear else range(len(names)), strict=True))

    @property
    def boxes(self) -> list[tuple[Box, int]]:
        """Box of each tile, and the number of its file."""
        numbers = self.files
        return [(one.box, numbers[one.leaf.extent.file]) for one in self.array.tiles]

    def sections(self) -> list[Section]:
        """Return the sections that show how it is cut."""
        return sections_of(self.array.spec.shape, self.boxes)

    def to_json(self) -> list[dict[str, Any]]:
        """Return its tiles as JSON values."""
        return [
            {
                "offset": list(tile.box.offset),
                "shape": list(tile.box.shape),
                "bytes": tile.leaf.extent.nbytes,
                "file": tile.leaf.extent.file,
                "digest": tile.leaf.digest.whole.hex(),
            }
            for tile in self.array.tiles
        ]


def map_leaves(reader: GenerationReader, states: Sequence[StoredState]) -> list[TileMap]:
    """Return a map of each leaf of some states, in order; of what this host has of them.

    Raises:
        CorruptGenerationError: If a table of tiles is damaged.
        ReadError: If it cannot be read.
    """
    return [
        TileMap(state.name, array)
        for state in states
        if not state.is_stream
        for array in state_arrays(reader, state, needs_all=False)
    ]


def pick_leaves(maps: Sequence[TileMap], wanted: str) -> list[TileMap]:
    """Return the leaves of a name, which may be preceded by that of the state.

    Raises:
        CommandError: If there is none; the message names a similar leaf.
    """
    found = [one for one in maps if wanted in (one.array.spec.name, one.name)]
    if found:
        return found
    names = [name for one in maps for name in (one.array.spec.name, one.name)]
    close = get_close_matches(wanted, names, 1)
    hint = f"did you mean {close[0]!r}?" if close else "show --all lists the leaves"
    raise misused(f"there is no leaf {wanted!r}; {hint}", "absent")


def show_map(screen: Screen, one: TileMap, *, limit: int | None) -> None:
    """Print the sections and the tiles of a leaf.

    Args:
        screen: The screen.
        one: The leaf.
        limit: Number of tiles to list; None for all.
    """
    spec, files = one.array.spec, one.files
    shape = " x ".join(map(str, spec.shape)) or "scalar"
    count = f"{plural(len(one.array.tiles), 'tile')} in {plural(len(files), 'file')}"
    size = bytes_text(spec.nbytes)
    screen.say()
    screen.say(f"{one.name}: {spec.dtype} {shape}, {size}, {count}", style="bold")
    for section in one.sections():
        screen.say(f"  {section.title}", style="dim")
        for line in draw(section, _WIDTH, _HEIGHT):
            screen.say(f"  {line}", whole=True)
    rows = [
        [symbol(files[leaf.extent.file]), str(box), bytes_text(leaf.extent.nbytes),
         leaf.extent.file]
        for box, leaf in one.array.tiles[:limit]
    ]  # fmt: skip
    screen.table([*_CELLS_OF_BOX, Column("file", names=True)], rows, indent=2)
    hidden = len(one.array.tiles) - len(rows)
    if hidden:
        screen.say(f"  ... and {hidden} more: --all shows them", style="dim")


def paint_map(one: TileMap, target: Path) -> None:
    """Write a picture of the tiles of a leaf, a PNG file.

    Args:
        one: The leaf.
        target: The file to make; it must not exist.

    Raises:
        CommandError: If matplotlib is missing, or the leaf has no sections to show.
        WriteError: If the file cannot be written.
    """
    sections = one.sections()
    if not sections:
        raise CommandError(
            f"{one.name} has the shape {list(one.array.spec.shape)}: a picture shows an "
            "array of one to three dimensions that has elements",
            kind="refused",
        )
    picture = _painted(one, sections)
    with new_file(target) as descriptor:
        filesystem.write_all(descriptor, picture, 0)


def _painted(one: TileMap, sections: Sequence[Section]) -> bytes:
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError as error:
        raise CommandError(
            "a picture in a file needs matplotlib: pip install matplotlib, or leave --png "
            "out to see it as text",
            kind="missing",
        ) from error
    colours = colormaps["tab20"]
    figure = Figure((_INCHES * len(sections), _INCHES), layout="constrained")
    figure.suptitle(_without_mathematics(one.name))
    axes = figure.subplots(1, len(sections), squeeze=False)[0]
    for place, section in zip(axes, sections, strict=True):
        for box, file in section.tiles:
            corner = (box.offset[1], box.offset[0])
            place.add_patch(
                Rectangle(
                    corner,
                    box.shape[1],
                    box.shape[0],
                    facecolor=colours(file % colours.N),
                    edgecolor="black",
                )
            )
        place.set_xlim(0, section.shape[1])
        place.set_ylim(section.shape[0], 0)
        place.set_title(section.title.replace("; ", "\n"), fontsize="small")
    patches = [
        Patch(facecolor=colours(number % colours.N), label=_without_mathematics(file))
        for file, number in list(one.files.items())[:_LEGEND_MAX]
    ]
    if len(one.files) > _LEGEND_MAX:
        more = f"and {len(one.files) - _LEGEND_MAX} more files"
        patches.append(Patch(facecolor="none", label=more))
    figure.legend(handles=patches, loc="outside lower center", fontsize="small", ncols=2)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _without_mathematics(text: str) -> str:
    """Return text from a file so that matplotlib shows it and runs no formula of it."""
    return clean(text).replace("$", r"\$")
