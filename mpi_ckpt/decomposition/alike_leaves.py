# SPDX-License-Identifier: Apache-2.0
"""Finds the fragments of leaves that are cut alike by looking at one of them. Pure.

A model has thousands of leaves, but few ways in which these are cut over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.decomposition.columns import ranges
from mpi_ckpt.decomposition.fragments import Fragments, find_fragments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.decomposition.fragments import Pieces, SavedTiles, WantedTiles


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
