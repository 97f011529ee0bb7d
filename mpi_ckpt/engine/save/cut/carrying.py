# SPDX-License-Identifier: Apache-2.0
"""Hands tiles to the rank that writes for its host, a piece at a time.

With ``writers="node"`` a host has one file, however many ranks. Whatever fails, each rank
sends and receives every message that another waits for, and raises at the next meeting.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import exchange_messages
from mpi_ckpt.engine.save.cut.cut_forms import handing_order
from mpi_ckpt.engine.save.cut.own_tiles import runs_of
from mpi_ckpt.engine.sync.captured import about_leaf
from mpi_ckpt.storage.format.tile_table import file_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.save.cut.own_tiles import CapturedTiles
    from mpi_ckpt.leaves.leaf import Leaf
    from mpi_ckpt.storage.format.tile_table import TileEntry

_PIECE_BYTES = 8 << 20
_DOING = "handing tiles to the writer of a host"


def hand_over(
    comm: Communicator, writer: int, captured: Mapping[str, Sequence[CapturedTiles]]
) -> None:
    """Send the tiles of this rank to its writer.

    Not collective: the writer receives them. Main thread only.

    Args:
        comm: The communicator.
        writer: The rank that writes for this host.
        captured: State -> the tiles of it.

    Raises:
        SaveError: On the calling rank, if a tile cannot be read.
    """
    tiles = [
        (one.entries[number], one, number)
        for of_state in captured.values()
        for one in of_state
        for number in range(len(one.leaves))
    ]
    tiles.sort(key=lambda tile: handing_order(tile[0]))
    entries = [entry for entry, _, _ in tiles]
    failure: BaseException | None = None
    for index in file_order(entries):
        _, one, number = tiles[index]
        pieces = _pieces_of(one.leaves[number])
        for length in _lengths(entries[index].nbytes):
            piece = np.zeros(length, np.uint8)
            if failure is None:
                try:
                    with about_leaf(one, one.leaves[number]):
                        piece = next(pieces)
                except BaseException as error:
                    failure = error
            exchange_messages(comm, [(writer, piece)], [], _DOING)
    if failure is not None:
        raise failure


class CarriedTiles:
    """The tiles that other ranks of the host hand over, on its writer.

    Not collective: those ranks call `hand_over`. Main thread only.

    Args:
        comm: The communicator.
        carried: Rank -> its tiles, in `handing_order`.
    """

    def __init__(
        self, comm: Communicator, carried: Mapping[int, Sequence[TileEntry]]
    ) -> None:
        self._comm = comm
        self.entries = [entry for entries in carried.values() for entry in entries]
        self._ranks = [rank for rank, entries in carried.items() for _ in entries]
        # The lengths of the messages that each rank still sends, in its order.
        self._waiting: dict[int, deque[int]] = {}
        for rank, entries in carried.items():
            order = file_order(entries)
            lengths = [n for at in order for n in _lengths(entries[at].nbytes)]
            self._waiting[rank] = deque(lengths)

    def runs(self, index: int) -> Iterator[memoryview]:
        """Receive the bytes of a tile, once those before it of its rank were received."""
        rank = self._ranks[index]
        for _ in _lengths(self.entries[index].nbytes):
            yield self._receive(rank).data

    def drain(self) -> None:
        """Receive what is still to come, after a failure."""
        for rank, waiting in self._waiting.items():
            while waiting:
                self._receive(rank)

    def _receive(self, rank: int) -> NDArray[np.uint8]:
        piece = np.empty(self._waiting[rank].popleft(), np.uint8)
        exchange_messages(self._comm, [], [(rank, piece)], _DOING)
        return piece


def _lengths(nbytes: int) -> list[int]:
    """Return the lengths of the messages in which a tile is handed over."""
    return [min(_PIECE_BYTES, nbytes - n) for n in range(0, nbytes, _PIECE_BYTES)]


def _pieces_of(leaf: Leaf) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tile in pieces of these lengths."""
    piece, filled, left = np.empty(0, np.uint8), 0, leaf.spec.nbytes
    for run in runs_of(leaf):
        data = np.frombuffer(run, np.uint8)
        while len(data):
            if filled == 0:
                piece = np.empty(min(_PIECE_BYTES, left), np.uint8)
            count = min(len(piece) - filled, len(data))
            np.copyto(piece[filled : filled + count], data[:count])
            data, filled = data[count:], filled + count
            if filled == len(piece):
                yield piece
                left, filled = left - filled, 0
