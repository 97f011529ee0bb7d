# SPDX-License-Identifier: Apache-2.0
"""Finds what saved pieces and wanted tiles have in common. Pure.

A *piece* is a digest block of a saved tile: bytes that are read and proven together. A
*fragment* is a box of elements that a piece and a wanted tile share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.decomposition.box_columns import (
    columns_of,
    pairs_that_meet,
    split_runs,
    strides_of,
)
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.decomposition.columns import Columns
from mpi_ckpt.decomposition.regions import Regions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class SavedTiles(Columns):
    """The tiles of a generation, as columns of length n.

    Attributes:
        leaf: Number of the leaf of each.
        file: Number of its file.
        position: Its first byte in the file.
        offsets: Offset of its box, (n, d); d is at least 1.
        shapes: Shape of its box, (n, d).
    """

    leaf: NDArray[np.int64]
    file: NDArray[np.int64]
    position: NDArray[np.int64]
    offsets: NDArray[np.int64]
    shapes: NDArray[np.int64]

    @classmethod
    def of(cls, tiles: Iterable[tuple[int, int, int, Box]]) -> SavedTiles:
        """Make the columns. Not collective. Thread-safe.

        Args:
            tiles: For each tile leaf, file, first byte in the file, and box.
        """
        return cls(*_columns(list(tiles)))


@dataclass(frozen=True, slots=True)
class WantedTiles(Columns):
    """The tiles that ranks want, as columns of length n; they may overlap.

    Attributes:
        leaf: Number of the leaf of each.
        rank: The rank that wants it.
        number: The number by which this rank knows it.
        offsets: Offset of its box, (n, d); d is at least 1.
        shapes: Shape of its box, (n, d).
    """

    leaf: NDArray[np.int64]
    rank: NDArray[np.int64]
    number: NDArray[np.int64]
    offsets: NDArray[np.int64]
    shapes: NDArray[np.int64]

    @classmethod
    def of(cls, tiles: Iterable[tuple[int, int, int, Box]]) -> WantedTiles:
        """Make the columns. Not collective. Thread-safe.

        Args:
            tiles: For each tile leaf, rank, number on this rank, and box.
        """
        return cls(*_columns(list(tiles)))


def _columns(tiles: list[tuple[int, int, int, Box]]) -> tuple[NDArray[np.int64], ...]:
    numbers = np.array([tile[:3] for tile in tiles], np.int64).reshape(len(tiles), 3)
    boxes = [tile[3] for tile in tiles]
    ndim = max([1, *(len(box.shape) for box in boxes)])
    return (*numbers.T.copy(), *columns_of(boxes, ndim))


@dataclass(frozen=True, slots=True)
class Pieces(Columns):
    """Digest blocks of saved tiles, as columns of length n.

    Attributes:
        tile: Row of the tile of each.
        number: Number of the block in the tile.
        first: Its first element, in C order of the tile.
        count: Number of its elements.
    """

    tile: NDArray[np.int64]
    number: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fragments:
    """Boxes that a piece and a wanted tile share, as columns of length n.

    Leaves that are cut alike have fragments of the same forms, which are stored once.

    Attributes:
        piece: Row of the piece of each.
        target: Row of the wanted tile.
        form: Row of the two regions.
        source: Where the elements lie in the piece.
        goal: Where they lie in the wanted tile.
    """

    piece: NDArray[np.int64]
    target: NDArray[np.int64]
    form: NDArray[np.int64]
    source: Regions
    goal: Regions


def find_fragments(
    saved: SavedTiles, wanted: WantedTiles, units: NDArray[np.int64], digest_bytes: int
) -> tuple[Pieces, Fragments]:
    """Cut saved tiles into pieces, and these into fragments of wanted tiles.

    Not collective. Thread-safe.

    Args:
        saved: The saved tiles, of as many dimensions as the wanted tiles.
        wanted: The tiles that ranks want.
        units: Bytes of an element of each leaf.
        digest_bytes: Length of a digest block, a multiple of each unit.

    Returns:
        The pieces, by tile and number; the fragments by piece and place in the piece.

    Raises:
        ValueError: If the saved tiles do not have each element of a wanted tile once.
    """
    pieces = _cut_pieces(saved, units, digest_bytes)
    runs, inner, shapes = split_runs(
        saved.shapes[pieces.tile], pieces.first, pieces.first + pieces.count
    )
    tiles = pieces.tile[runs]
    offsets = saved.offsets[tiles] + inner
    # The leaf as one more axis: only boxes of the same leaf meet.
    run, target = pairs_that_meet(
        *_with_axis(saved.leaf[tiles], offsets, shapes),
        *_with_axis(wanted.leaf, wanted.offsets, wanted.shapes),
    )
    low = np.maximum(offsets[run], wanted.offsets[target])
    high = np.minimum(offsets[run] + shapes[run], (wanted.offsets + wanted.shapes)[target])
    # The first element of each run, counted from the first of its piece.
    place = (inner * strides_of(saved.shapes)[tiles]).sum(axis=1) - pieces.first[runs]
    source = Regions(place[run], shapes[run], low - offsets[run], high - low)
    goal = Regions(
        np.zeros_like(target),
        wanted.shapes[target],
        low - wanted.offsets[target],
        high - low,
    )
    _check_counts(wanted, target, source.sizes())
    form = np.arange(len(run))
    return pieces, Fragments(runs[run], target, form, source, goal)


def _cut_pieces(saved: SavedTiles, units: NDArray[np.int64], digest_bytes: int) -> Pieces:
    sizes = saved.shapes.prod(axis=1)
    # Digests cover bytes from the tile's first on, whatever its shape.
    longest = digest_bytes // units[saved.leaf]
    counts = -(-sizes // longest)
    tile = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * longest[tile]
    return Pieces(tile, number, first, np.minimum(longest[tile], sizes[tile] - first))


def _with_axis(
    index: NDArray[np.int64], offsets: NDArray[np.int64], shapes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.column_stack((index, offsets)), np.column_stack((np.ones_like(index), shapes))


def _check_counts(
    wanted: WantedTiles, target: NDArray[np.int64], sizes: NDArray[np.int64]
) -> None:
    # A missing fragment would leave old elements in a tile, and nobody would notice. As
    # floats, which are exact up to 2**53 elements.
    found = np.bincount(target, sizes, len(wanted.leaf)).astype(np.int64)
    expected = wanted.shapes.prod(axis=1)
    wrong = np.flatnonzero(found != expected)
    if not len(wrong):
        return
    row = wrong[0]
    box = Box(tuple(wanted.offsets[row].tolist()), tuple(wanted.shapes[row].tolist()))
    raise ValueError(
        f"the saved tiles of leaf {wanted.leaf[row]} have {found[row]} elements for "
        f"{box}, which is tile {wanted.number[row]} of rank {wanted.rank[row]}; "
        f"expected {expected[row]}"
    )
