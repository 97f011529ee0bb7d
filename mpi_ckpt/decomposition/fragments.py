# SPDX-License-Identifier: Apache-2.0
"""Finds what saved pieces and wanted tiles have in common. Pure.

A *piece* is a digest block of a saved tile: bytes that are read and proven together. A
*fragment* is a box of elements that a piece and a wanted tile share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.decomposition.box_columns import (
    columns_of,
    pairs_that_meet,
    split_runs,
    strides_of,
)
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.decomposition.columns import Columns, ranges
from mpi_ckpt.decomposition.regions import Regions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Rows in groups: the rows, group by group; each group's first place and length."""

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def by_length(cls, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> _Grouped:
        return cls(rows, np.cumsum(counts) - counts, counts)

    def select(self, groups: NDArray[np.int64]) -> _Grouped:
        """Return some groups, in any order, also several times."""
        counts = self.counts[groups]
        places = ranges(self.starts[groups], counts)
        return _Grouped.by_length(self.rows[places], counts)

    def owners(self) -> NDArray[np.int64]:
        """Return the group of each place."""
        return np.arange(len(self.counts)).repeat(self.counts)


def find_fragments_by_kind(
    saved: SavedTiles, wanted: WantedTiles, units: NDArray[np.int64], digest_bytes: int
) -> tuple[Pieces, Fragments]:
    """Do what `find_fragments` does, once for all leaves that are cut alike.

    Not collective. Thread-safe. Pieces that nobody wants may be missing. The order of the
    tiles does not matter to the order of pieces and fragments.

    Args:
        saved: As for `find_fragments`; also tiles of leaves that nobody wants.
        wanted: As for `find_fragments`.
        units: As for `find_fragments`.
        digest_bytes: As for `find_fragments`.

    Returns:
        The pieces of each leaf in turn, and their fragments.

    Raises:
        ValueError: As for `find_fragments`.
    """
    leaves = np.unique(wanted.leaf)
    tiles = _by_leaf(leaves, saved.leaf, saved.shapes, saved.offsets)
    numbers = np.column_stack((wanted.rank, wanted.number))
    targets = _by_leaf(leaves, wanted.leaf, wanted.shapes, numbers)
    # Ranks and files are no part of a kind: boxes alone decide where elements lie.
    first_leaves, kinds = _kinds(
        units[leaves],
        (tiles, np.column_stack((saved.offsets, saved.shapes))),
        (targets, np.column_stack((wanted.offsets, wanted.shapes))),
    )
    some_tiles, some_targets = tiles.select(first_leaves), targets.select(first_leaves)
    pieces, fragments = find_fragments(
        saved.rows(some_tiles.rows), wanted.rows(some_targets.rows), units, digest_bytes
    )
    kind_of_piece = some_tiles.owners()[pieces.tile]
    all_pieces = _counted(kind_of_piece, len(first_leaves))
    all_fragments = _counted(kind_of_piece[fragments.piece], len(first_leaves))
    # Each leaf gets a copy of its kind's rows, with references to its own rows.
    copies, copied = all_pieces.select(kinds), all_fragments.select(kinds)
    leaf, row = copies.owners(), copies.rows
    tile = _moved(pieces.tile[row], some_tiles.starts[kinds], tiles.starts, leaf)
    made = replace(pieces.rows(row), tile=tiles.rows[tile])
    leaf, row = copied.owners(), copied.rows
    target = _moved(fragments.target[row], some_targets.starts[kinds], targets.starts, leaf)
    return made, Fragments(
        _moved(fragments.piece[row], all_pieces.starts[kinds], copies.starts, leaf),
        targets.rows[target],
        row,
        fragments.source,
        fragments.goal,
    )


def _by_leaf(
    leaves: NDArray[np.int64],
    leaf: NDArray[np.int64],
    shapes: NDArray[np.int64],
    keys: NDArray[np.int64],
) -> _Grouped:
    """Group the rows of tiles that are not empty by leaf, and sort each group."""
    rows = np.flatnonzero((shapes > 0).all(axis=1) & np.isin(leaf, leaves))
    # In one order for all leaves: then equal tables are equal bytes.
    rows = rows[np.lexsort((*keys[rows].T[::-1], leaf[rows]))]
    starts = np.searchsorted(leaf[rows], leaves)
    ends = np.searchsorted(leaf[rows], leaves, side="right")
    return _Grouped(rows, starts, ends - starts)


def _kinds(
    units: NDArray[np.int64], *tables: tuple[_Grouped, NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first leaf of each kind, and the kind of each leaf."""
    ordered = [values[grouped.rows] for grouped, values in tables]
    ends = [(grouped.starts + grouped.counts).tolist() for grouped, _ in tables]
    starts = [grouped.starts.tolist() for grouped, _ in tables]
    seen: dict[Sequence[object], int] = {}
    first_leaves: list[int] = []
    kinds = []
    for leaf, unit in enumerate(units.tolist()):
        tables_of_leaf = zip(ordered, starts, ends, strict=True)
        key = (
            unit,
            *(t[start[leaf] : end[leaf]].tobytes() for t, start, end in tables_of_leaf),
        )
        kind = seen.setdefault(key, len(seen))
        if kind == len(first_leaves):
            first_leaves.append(leaf)
        kinds.append(kind)
    return np.array(first_leaves, np.int64), np.array(kinds, np.int64)


def _counted(kind_of_row: NDArray[np.int64], kinds: int) -> _Grouped:
    """Group rows that are in the order of their kinds."""
    counts = np.bincount(kind_of_row, minlength=kinds)
    return _Grouped.by_length(np.arange(len(kind_of_row)), counts)


def _moved(
    values: NDArray[np.int64],
    old_starts: NDArray[np.int64],
    new_starts: NDArray[np.int64],
    leaf: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Turn places counted from one start for each leaf into places from another."""
    return values + (new_starts - old_starts)[leaf]
