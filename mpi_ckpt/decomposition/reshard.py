# SPDX-License-Identifier: Apache-2.0
"""Plans how saved tiles reach the ranks that want other tiles of the same leaves. Pure.

A single rank reads and proves each piece, a digest block of a saved tile, and sends to the
other ranks the fragments that they want.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.decomposition.columns import ranges
from mpi_ckpt.decomposition.fragments import find_fragments_by_kind
from mpi_ckpt.decomposition.rank_plan import (
    Incoming,
    Outgoing,
    RankPlan,
    ReadPieces,
    Reads,
    Staying,
)
from mpi_ckpt.decomposition.turns import Needs, choose_readers, cut_windows, order_turns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.decomposition.fragments import Pieces, SavedTiles, WantedTiles
    from mpi_ckpt.decomposition.regions import Regions


@dataclass(frozen=True, slots=True)
class _RowsByRank:
    """Finds the rows that have a rank; they keep their order."""

    rows: NDArray[np.int64]
    ranks: NDArray[np.int64]

    @classmethod
    def index(cls, ranks: NDArray[np.int64]) -> _RowsByRank:
        rows = np.argsort(ranks, kind="stable")
        return cls(rows, ranks[rows])

    def of(self, rank: int) -> NDArray[np.int64]:
        first, end = np.searchsorted(self.ranks, [rank, rank + 1])
        return self.rows[first:end]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardPlan:
    """What all ranks do in a restore; `of_rank` returns the part of one.

    Attributes:
        turns: Number of turns.
        reads: All windows, in the order of files and positions.
        reader: Reader of each window.
        pieces: All pieces that ranks want, in the order of files and positions.
    """

    turns: int
    reads: Reads
    reader: NDArray[np.int64]
    pieces: ReadPieces
    # Of each fragment, by turn, reader and receiver.
    _window: NDArray[np.int64]
    _receiver: NDArray[np.int64]
    _piece: NDArray[np.int64]
    _number: NDArray[np.int64]
    _unit: NDArray[np.int64]
    _form: NDArray[np.int64]
    _source: Regions
    _goal: Regions
    _windows_of: _RowsByRank
    _read_by: _RowsByRank
    _received_by: _RowsByRank

    def of_rank(self, rank: int) -> RankPlan:
        """Return what one rank does. Not collective. Thread-safe."""
        # A rank's windows keep their order, so its pieces are found by bisection.
        reads = self.reads.rows(self._windows_of.of(rank))
        pieces = ranges(reads.first_piece, reads.pieces)
        read, received = self._read_by.of(rank), self._received_by.of(rank)
        is_own = self._receiver[read] == rank
        return RankPlan(
            self.turns,
            replace(reads, first_piece=np.cumsum(reads.pieces) - reads.pieces),
            self.pieces.rows(pieces),
            self._outgoing(read[~is_own], pieces),
            self._incoming(received[self.reader[self._window[received]] != rank]),
            self._kept(read[is_own], pieces),
        )

    def _outgoing(self, rows: NDArray[np.int64], pieces: NDArray[np.int64]) -> Outgoing:
        return Outgoing(
            self.reads.turn[self._window[rows]],
            self._receiver[rows],
            np.searchsorted(pieces, self._piece[rows]),
            self._unit[rows],
            self._source.rows(self._form[rows]),
        )

    def _incoming(self, rows: NDArray[np.int64]) -> Incoming:
        return Incoming(
            self.reads.turn[self._window[rows]],
            self.reader[self._window[rows]],
            self._number[rows],
            self._unit[rows],
            self._goal.rows(self._form[rows]),
        )

    def _kept(self, rows: NDArray[np.int64], pieces: NDArray[np.int64]) -> Staying:
        return Staying(
            self.reads.turn[self._window[rows]],
            np.searchsorted(pieces, self._piece[rows]),
            self._number[rows],
            self._unit[rows],
            self._source.rows(self._form[rows]),
            self._goal.rows(self._form[rows]),
        )


def plan_reshard(
    saved: SavedTiles,
    wanted: WantedTiles,
    *,
    itemsizes: NDArray[np.int64],
    digest_bytes: int,
    readers: Sequence[int],
    window_bytes: int,
    holders: Sequence[Sequence[int]] | None = None,
) -> ReshardPlan:
    """Plan which rank reads what, and what it sends to others.

    Not collective. Thread-safe. The order of the wanted tiles changes nothing.

    Args:
        saved: The tiles of a generation. Those of each leaf tile it; those of each file
            have no bytes in common.
        wanted: The tiles that ranks want: any boxes of these leaves.
        itemsizes: For each leaf the bytes of an element; (leaves,).
        digest_bytes: Length of a digest block.
        readers: The ranks that may read; not empty.
        window_bytes: A reader reads at most a quarter of these in a turn, unless a digest
            block is longer, and a receiver gets at most half of these from others, unless
            it needs more of a single window.
        holders: For each file the readers that have it; None: all have all files.

    Returns:
        The plan of all ranks.

    Raises:
        ValueError: If the saved tiles do not have each element of a wanted tile once.
    """
    cut_saved, cut_wanted, units = _in_units(saved, wanted, itemsizes, digest_bytes)
    pieces, fragments = find_fragments_by_kind(cut_saved, cut_wanted, units, digest_bytes)
    placed, piece = _in_file_order(saved, units, pieces, fragments.piece)
    file = saved.file[placed.tile]
    end = placed.position + placed.nbytes
    first = cut_windows(
        file, placed.position, end, readers=len(readers), window_bytes=window_bytes
    )
    count = np.diff(first, append=len(file))
    start, stop = placed.position[first], end[first + count - 1]
    window = np.searchsorted(first, piece, side="right") - 1
    receiver = wanted.rank[fragments.target]
    unit = units[wanted.leaf[fragments.target]]
    nbytes = fragments.source.sizes()[fragments.form] * unit
    needs = Needs.count(window, receiver, nbytes)
    reader = choose_readers(file[first], stop - start, needs, readers, holders)
    turn = order_turns(reader, needs, window_bytes)
    number = wanted.number[fragments.target]
    # Messages carry no description: both sides have the fragments in this order.
    order = np.lexsort((receiver, reader[window], turn[window]))
    return ReshardPlan(
        turns=int(turn.max(initial=-1)) + 1,
        reads=Reads(turn, file[first], start, stop, first, count),
        reader=reader,
        pieces=placed,
        _window=window[order],
        _receiver=receiver[order],
        _piece=piece[order],
        _number=number[order],
        _unit=unit[order],
        _form=fragments.form[order],
        _source=fragments.source,
        _goal=fragments.goal,
        _windows_of=_RowsByRank.index(reader),
        _read_by=_RowsByRank.index(reader[window[order]]),
        _received_by=_RowsByRank.index(receiver[order]),
    )


def _in_units(
    saved: SavedTiles, wanted: WantedTiles, itemsizes: NDArray[np.int64], digest_bytes: int
) -> tuple[SavedTiles, WantedTiles, NDArray[np.int64]]:
    """Give all tiles as many dimensions, and elements that no digest block divides.

    Where the length of a digest block is no multiple of an element, as of a record of 12
    bytes, the bytes of an element become one more dimension.
    """
    is_divided = digest_bytes % itemsizes != 0
    ndim = max(saved.offsets.shape[1], wanted.offsets.shape[1])
    has_bytes = bool(is_divided[wanted.leaf].any())
    lengths = np.where(is_divided, itemsizes, 1)

    def widened(table: SavedTiles | WantedTiles) -> dict[str, NDArray[np.int64]]:
        before = np.zeros((len(table.leaf), ndim - table.offsets.shape[1]), np.int64)
        after = lengths[table.leaf][:, None][:, : int(has_bytes)]
        return {
            "offsets": np.hstack((before, table.offsets, np.zeros_like(after))),
            "shapes": np.hstack((before + 1, table.shapes, after)),
        }

    return (
        replace(saved, **widened(saved)),
        replace(wanted, **widened(wanted)),
        np.where(is_divided, 1, itemsizes),
    )


def _in_file_order(
    saved: SavedTiles, units: NDArray[np.int64], pieces: Pieces, piece: NDArray[np.int64]
) -> tuple[ReadPieces, NDArray[np.int64]]:
    """Sort the wanted pieces; return also each fragment's piece under its new number."""
    rows = np.flatnonzero(np.bincount(piece, minlength=len(pieces.tile)))
    wanted = pieces.rows(rows)
    unit = units[saved.leaf[wanted.tile]]
    position = saved.position[wanted.tile] + wanted.first * unit
    order = np.lexsort((position, saved.file[wanted.tile]))
    tile = wanted.tile[order]
    placed = ReadPieces(
        tile,
        saved.leaf[tile],
        wanted.number[order],
        position[order],
        (wanted.count * unit)[order],
        saved.offsets[tile],
        saved.shapes[tile],
    )
    new_number = np.empty(len(pieces.tile), np.int64)
    new_number[rows[order]] = np.arange(len(rows))
    return placed, new_number[piece]
