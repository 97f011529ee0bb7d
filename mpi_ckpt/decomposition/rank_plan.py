# SPDX-License-Identifier: Apache-2.0
"""What a single rank does in a restore: reads, sends, receives and keeps. Pure.

Root plans for all ranks, and sends to each its own `RankPlan`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.decomposition.columns import Columns, decode_columns, encode_columns
from mpi_ckpt.decomposition.regions import Regions

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Reads(Columns):
    """The windows that a rank reads, as columns, in the order of their turns.

    Attributes:
        turn: Turn of each window; no two windows have the same.
        file: Number of the file.
        start: First byte in the file.
        end: One past the last byte.
        first_piece: The window's first row among the pieces; the others follow.
        pieces: Number of its pieces.
    """

    turn: NDArray[np.int64]
    file: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    first_piece: NDArray[np.int64]
    pieces: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReadPieces(Columns):
    """The digest blocks in a rank's windows, as columns, in the order of the windows.

    Attributes:
        tile: Row of the tile among all saved tiles.
        leaf: Number of its leaf.
        number: Number of the block in the tile.
        position: First byte in the file.
        nbytes: Its length.
        offsets: Offset of the tile's box, (n, d), with zeros before those of the leaf.
        shapes: Shape of the tile's box, (n, d), with ones before those of the leaf.
    """

    tile: NDArray[np.int64]
    leaf: NDArray[np.int64]
    number: NDArray[np.int64]
    position: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    shapes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Outgoing(Columns):
    """Fragments that a rank sends, as columns, in the order of turns and receivers.

    Attributes:
        turn: Turn of each fragment.
        rank: The receiver.
        piece: Row among the rank's pieces.
        unit: Bytes of an element.
        source: Where the elements are in the piece.
    """

    turn: NDArray[np.int64]
    rank: NDArray[np.int64]
    piece: NDArray[np.int64]
    unit: NDArray[np.int64]
    source: Regions


@dataclass(frozen=True, slots=True)
class Incoming(Columns):
    """Fragments that a rank receives, as columns, in the order of turns and senders.

    Attributes:
        turn: Turn of each fragment.
        rank: The sender.
        target: The rank's own number of the wanted tile.
        unit: Bytes of an element.
        goal: Where the elements belong in the wanted tile.
    """

    turn: NDArray[np.int64]
    rank: NDArray[np.int64]
    target: NDArray[np.int64]
    unit: NDArray[np.int64]
    goal: Regions


@dataclass(frozen=True, slots=True)
class Staying(Columns):
    """Fragments that a rank reads for itself, as columns, in the order of turns.

    Attributes:
        turn: Turn of each fragment.
        piece: Row among the rank's pieces.
        target: The rank's own number of the wanted tile.
        unit: Bytes of an element.
        source: Where the elements are in the piece.
        goal: Where they belong in the wanted tile.
    """

    turn: NDArray[np.int64]
    piece: NDArray[np.int64]
    target: NDArray[np.int64]
    unit: NDArray[np.int64]
    source: Regions
    goal: Regions


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message: the other rank, rows of its fragments one behind the other, length."""

    rank: int
    fragments: range
    nbytes: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What a rank does in one turn.

    Attributes:
        window: Row of the window that it reads; None if it reads nothing.
        pieces: Rows of the window's pieces.
        sends: Messages to others, by increasing rank; rows of the outgoing fragments.
        first_alike: For each of these the first with the same bytes, maybe itself.
        receives: Messages from others, by increasing rank; rows of the incoming fragments.
        kept: Rows of the fragments that it reads for itself.
    """

    window: int | None
    pieces: range
    sends: tuple[Transfer, ...]
    first_alike: tuple[int, ...]
    receives: tuple[Transfer, ...]
    kept: range


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank does in a restore.

    Attributes:
        turns: Number of turns, the same on every rank.
        reads: Windows that it reads.
        pieces: What is proven in the windows.
        sends: What it sends.
        receives: What it receives; each message has the same fragments, in the same order,
            as the sender's.
        kept: What it reads for itself.
    """

    turns: int
    reads: Reads
    pieces: ReadPieces
    sends: Outgoing
    receives: Incoming
    kept: Staying

    @property
    def bytes_moved(self) -> int:
        """Bytes that the rank reads from files, or gets from other ranks."""
        table = self.receives
        received = table.goal.shape.prod(axis=1) * table.unit
        return int((self.reads.end - self.reads.start).sum() + received.sum())

    def turn(self, number: int) -> Turn:
        """Return what the rank does in a turn. Not collective. Thread-safe."""
        rows = _rows_of(self.reads.turn, number)
        window = rows.start if rows else None
        first = int(self.reads.first_piece[rows.start]) if rows else 0
        pieces = range(first, first + int(self.reads.pieces[rows.start]) if rows else 0)
        sends = _transfers(self.sends, self.sends.source, number)
        return Turn(
            window,
            pieces,
            sends,
            _first_alike(self.sends, sends),
            _transfers(self.receives, self.receives.goal, number),
            _rows_of(self.kept.turn, number),
        )

    def encode(self) -> bytes:
        """Return the plan as bytes, for `decode` on another rank. Not collective."""
        # INVARIANT: no pickle, although a rank of the same job reads it.
        tables = {name: getattr(self, name) for name in _TABLES}
        columns = {
            k: v for name, one in tables.items() for k, v in one.named(f"{name}.").items()
        }
        return encode_columns(columns, self.turns)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> RankPlan:
        """Return the plan that `encode` made bytes of. Not collective. Thread-safe."""
        columns, turns = decode_columns(data)
        tables = (_table_of(kind, f"{name}.", columns) for name, kind in _TABLES.items())
        return cls(turns, *tables)


_TABLES: dict[str, type[Columns]] = {
    "reads": Reads,
    "pieces": ReadPieces,
    "sends": Outgoing,
    "receives": Incoming,
    "kept": Staying,
}


def _table_of(kind: Any, prefix: str, columns: dict[str, NDArray[np.int64]]) -> Any:  # noqa: ANN401 (any table)
    return kind(
        *(
            _table_of(Regions, f"{prefix}{field.name}.", columns)
            if field.type == Regions.__name__
            else columns[prefix + field.name]
            for field in fields(kind)
        )
    )


def _rows_of(turns: NDArray[np.int64], number: int) -> range:
    first, end = np.searchsorted(turns, [number, number + 1]).tolist()
    return range(first, end)


def _transfers(
    table: Outgoing | Incoming, regions: Regions, number: int
) -> tuple[Transfer, ...]:
    rows = _rows_of(table.turn, number)
    if not rows:
        return ()
    here = slice(rows.start, rows.stop)
    ranks = table.rank[here]
    nbytes = regions.shape[here].prod(axis=1) * table.unit[here]
    # Fragments are in the order of ranks: a message ends where the rank changes.
    bounds = [0, *(np.flatnonzero(np.diff(ranks)) + 1).tolist(), len(ranks)]
    return tuple(
        Transfer(
            int(ranks[first]),
            range(rows.start + first, rows.start + end),
            int(nbytes[first:end].sum()),
        )
        for first, end in pairwise(bounds)
    )


def _first_alike(table: Outgoing, sends: tuple[Transfer, ...]) -> tuple[int, ...]:
    """Find messages with the same bytes: ranks may want the same box."""
    firsts: dict[tuple[bytes, ...], int] = {}
    found = []
    for number, send in enumerate(sends):
        fragments = table.rows(slice(send.fragments.start, send.fragments.stop)).named()
        del fragments["rank"]
        content = tuple(column.tobytes() for column in fragments.values())
        found.append(firsts.setdefault(content, number))
    return tuple(found)
