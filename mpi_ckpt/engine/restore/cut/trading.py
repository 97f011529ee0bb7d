# SPDX-License-Identifier: Apache-2.0
"""Brings leaves that are cut over ranks, in the files or in the program, to their places.

Each saved byte is read by one rank, once, and proven before it is sent or stored.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack, closing
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm import UNTOUCHED, agree, exchange_messages
from mpi_ckpt.decomposition.regions import elements_of
from mpi_ckpt.engine.restore.cut.copied_tiles import CopiedWindows, held_memories
from mpi_ckpt.engine.restore.cut.routing import route_rows
from mpi_ckpt.engine.restore.cut.wanted import tiles_here
from mpi_ckpt.engine.restore.matching import OVERWRITTEN
from mpi_ckpt.errors import CorruptGenerationError, ReadError, RestoreError
from mpi_ckpt.failures import concerning
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.reading.file_reader import FileReader
from mpi_ckpt.storage.reading.read_plan import Window
from mpi_ckpt.storage.reading.read_queue import ReadQueue, Slots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Deferred
    from mpi_ckpt.decomposition.rank_plan import Incoming, Outgoing, Staying, Turn
    from mpi_ckpt.decomposition.regions import Regions
    from mpi_ckpt.engine.restore.cut.trade_plan import Trade, Trades
    from mpi_ckpt.engine.restore.cut.wanted import TradedTile
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import Progress

_READING = "reading a generation"

_OUT_OF_SIGHT = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ESTALE)


def trade_tiles(
    session: Session,
    found: OpenGeneration,
    trade: Trade,
    targets: Sequence[TradedTile],
    deferred: Deferred,
    *,
    safe: Sequence[str],
    progress: Progress,
) -> int:
    """Read, prove, send and store the tiles, in turns.

    Collective. Main thread only. In a turn each rank takes at most one window, while it
    reads and proves the next ones.

    Args:
        session: The manager's.
        found: The generation.
        trade: What this rank does.
        targets: The tiles that it wants, by the plan's numbers.
        deferred: Keeps failures to store bytes, for the next meeting.
        safe: What is still safe if the first turn fails, and if a later one does.
        progress: Counts the bytes that this rank has read, or got from others.

    Returns:
        Bytes read by this rank, but for those that its reader of ``found`` counts.

    Raises:
        CorruptGenerationError: On every rank, if bytes are not those saved.
        ReadError: On every rank, if a rank cannot read.
    """
    path = session.directory.root / generation_name(found.outline.generation)
    with ExitStack() as stack:
        if found.kept is not None and found.reader is not None:
            reader: FileReader = found.reader
        else:
            reader = stack.enter_context(FileReader(path, found.outline.generation))
        memories = held_memories(session, found) if found.is_copy else None
        args = session, reader, trade, targets, memories
        trader = stack.enter_context(closing(_Trader(*args)))
        trader.sees_own_files = found.kept is not None
        for number in range(trade.plan.turns):
            turn = trade.plan.turn(number)

            def read(turn: Turn = turn) -> None:
                deferred.raise_failure()
                trader.read(turn)

            kept = safe[min(number, 1)]
            agree(session.comm, _READING, read, error=RestoreError, safe=kept)
            trader.release()
            trader.exchange(turn, deferred)
            progress.count(trader.bytes_moved(turn))
        return 0 if reader is found.reader else reader.bytes_read


def trade_leaves(
    session: Session,
    found: OpenGeneration,
    match: StateMatch,
    trades: Trades,
    deferred: Deferred,
    progress: Progress,
    *,
    is_overwritten: bool,
) -> int:
    """Bring leaves that are cut to their places, and rows to the ranks that want them.

    Collective. Main thread only.

    Args:
        session: The manager's.
        found: The generation.
        match: The states to restore, with this rank's destinations.
        trades: What this rank does.
        deferred: As for `trade_tiles`.
        progress: As for `trade_tiles`.
        is_overwritten: Whether other leaves of the generation have been stored already.

    Returns:
        Bytes read by this rank.

    Raises:
        CheckpointError: On every rank, as `trade_tiles` and `route_rows` do.
    """
    safe = OVERWRITTEN if is_overwritten else UNTOUCHED, OVERWRITTEN
    targets = tiles_here(match, sorted(trades.leaves))
    args = session, found, trades.of_leaves, targets, deferred
    nbytes = trade_tiles(*args, safe=safe, progress=progress)
    route_rows(session.comm, match, session.options.io.window_bytes, deferred)
    return nbytes


class _Trader:
    """This rank's side of a trade, turn by turn.

    Args:
        session: The manager's.
        reader: Reads the files that the plan names.
        trade: What this rank does.
        targets: The tiles that it wants, by the plan's numbers.
        memories: What it holds of a copy in memory, in place of files; else None.

    Attributes:
        sees_own_files: Whether no other rank can open the files that this one reads.
    """

    def __init__(
        self,
        session: Session,
        reader: FileReader,
        trade: Trade,
        targets: Sequence[TradedTile],
        memories: Mapping[str, memoryview] | None,
    ) -> None:
        self._comm = session.comm
        self._window_bytes = session.options.io.window_bytes
        self._reader = reader
        self._memories_held = memories
        self._trade = trade
        self._plan = plan = trade.plan
        self._targets = targets
        self._memories = [tile.buffer.host_bytes() for tile in targets]
        columns = (plan.reads.file, plan.reads.start, plan.reads.end)
        self._windows = [
            Window(trade.files[file], start, end, ())
            for file, start, end in zip(*(c.tolist() for c in columns), strict=True)
        ]
        self._start = 0
        self._data = memoryview(b"")
        self.sees_own_files = False

    @cached_property
    def _queue(self) -> ReadQueue[None] | CopiedWindows:
        if self._memories_held is not None:
            return CopiedWindows(self._memories_held, self._windows)
        slots = Slots.of(self._windows, self._window_bytes)
        return ReadQueue(self._reader, self._windows, self._prove, slots)

    def close(self) -> None:
        """End the threads that read."""
        if "_queue" in vars(self):
            self._queue.close()

    def read(self, turn: Turn) -> None:
        """Read and prove the window of a turn, if this rank has one. Not collective.

        Raises:
            CorruptGenerationError: On the calling rank, if its bytes are not those saved.
            ReadError: On the calling rank, if it cannot read.
        """
        if turn.window is None:
            return
        self._data = self._take()
        self._start = self._windows[turn.window].start

    def release(self) -> None:
        """Let later windows overwrite those of earlier turns. Not collective."""
        if "_queue" in vars(self):
            self._queue.release()

    def exchange(self, turn: Turn, deferred: Deferred) -> None:
        """Send and receive the messages of a turn, and store what has arrived.

        Main thread only. Called on every rank, after all have read.
        """
        receives = [(one.rank, np.empty(one.nbytes, np.uint8)) for one in turn.receives]
        # Ranks that want the same are sent the same memory.
        packed = {
            number: self._pack(turn.sends[number].fragments, turn.sends[number].nbytes)
            for number in set(turn.first_alike)
        }
        sends = [
            (one.rank, packed[first])
            for one, first in zip(turn.sends, turn.first_alike, strict=True)
        ]
        exchange_messages(self._comm, sends, receives, "sending a generation")

        def store() -> None:
            for row in turn.kept:
                self._store(self._plan.kept, row, self._elements(self._plan.kept, row))
            for one, (_, message) in zip(turn.receives, receives, strict=True):
                self._unpack(one.fragments, message)

        deferred.attempt(store)

    def bytes_moved(self, turn: Turn) -> int:
        """Return the bytes that a turn brings to this rank. Not collective."""
        window = None if turn.window is None else self._windows[turn.window]
        read = 0 if window is None else window.end - window.start
        return read + sum(message.nbytes for message in turn.receives)

    def _take(self) -> memoryview:
        try:
            data, _ = self._queue.take()
        except (CorruptGenerationError, ReadError) as error:
            is_own = self._comm.is_root or self.sees_own_files
            if is_own or not _is_out_of_sight(error):
                raise
            # Root has opened this file: the fault is in this host's view of it.
            raise ReadError(
                f"{error}. Root can open it; state that is cut over ranks needs a "
                "directory that all ranks see and may read",
                path=self._reader.path,
                errno=error.errno,
            ) from error
        return data

    def _prove(self, number: int, data: memoryview) -> None:
        """Prove the pieces of a window, in a thread."""
        reads, pieces, window = self._plan.reads, self._plan.pieces, self._windows[number]
        first = int(reads.first_piece[number])
        for row in range(first, first + int(reads.pieces[number])):
            place, digest = int(pieces.position[row]), self._trade.digests[row]
            start = place - window.start
            piece = data[start : start + int(pieces.nbytes[row])]
            self._reader.prove_bytes(window.file, place, piece, digest)

    def _piece(self, row: int) -> memoryview:
        """Return the bytes of a piece of the window that was read last."""
        pieces = self._plan.pieces
        first = int(pieces.position[row]) - self._start
        return self._data[first : first + int(pieces.nbytes[row])]

    def _elements(self, table: Outgoing | Staying, row: int) -> NDArray[Any]:
        """Return the elements of a fragment of a piece, without a copy."""
        memory = elements_of(self._piece(int(table.piece[row])), int(table.unit[row]))
        return table.source.view(row, memory)

    def _pack(self, fragments: range, nbytes: int) -> NDArray[np.uint8]:
        message = np.empty(nbytes, np.uint8)
        end = 0
        for row in fragments:
            view = self._elements(self._plan.sends, row)
            start, end = end, end + view.nbytes
            room = message[start:end].view(view.dtype).reshape(view.shape)
            np.copyto(room, view)  # lets other threads run
        return message

    def _unpack(self, fragments: range, message: NDArray[np.uint8]) -> None:
        table, end = self._plan.receives, 0
        for row in fragments:
            shape, unit = table.goal.shape[row], int(table.unit[row])
            start, end = end, end + int(shape.prod()) * unit
            elements = elements_of(message[start:end], unit)
            self._store(table, row, elements.reshape(shape))

    def _store(self, table: Incoming | Staying, row: int, elements: NDArray[Any]) -> None:
        """Put elements where they belong in a wanted tile."""
        number, goal = int(table.target[row]), table.goal
        target, memory = self._targets[number], self._memories[number]
        with concerning(target.name):
            if memory is None:
                _write_part(target, goal, row, elements)
                return
            live = memory
            if elements.itemsize == memory.shape[-1]:
                live = memory.view(elements.dtype)[..., 0]
            # The plan has more dimensions, all of length 1: no copy is made.
            view = live.reshape(goal.outer[row])[_slices(goal, row)]
            np.copyto(view, elements)


def _is_out_of_sight(error: CorruptGenerationError | ReadError) -> bool:
    """Return whether a rank does not find a file, or may not open it."""
    if isinstance(error, ReadError):
        return error.errno in _OUT_OF_SIGHT
    return isinstance(error.__cause__, ReadError)


def _slices(goal: Regions, row: int) -> tuple[slice, ...]:
    starts, lengths = goal.start[row].tolist(), goal.shape[row].tolist()
    return tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))


def _write_part(
    target: TradedTile, goal: Regions, row: int, elements: NDArray[Any]
) -> None:
    """Put a fragment into memory whose elements have no live bytes in file order."""
    slices, outer = _slices(goal, row), goal.outer[row].tolist()
    data = np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
    if elements.itemsize == target.itemsize:
        first = len(outer) - len(target.shape)
        if tuple(outer[first:]) != target.shape:
            first -= 1  # the plan's last dimension, of length 1, is of other leaves' bytes
        part = target.buffer.part(slices[first : first + len(target.shape)])
    else:
        # The plan's last dimension is of bytes: a digest block may end within an element.
        *inner, within = slices[len(outer) - len(target.shape) - 1 :]
        part = target.buffer.part(tuple(inner))
        whole = np.frombuffer(part.read(), np.uint8).reshape(-1, target.itemsize).copy()
        whole[:, within] = data.reshape(len(whole), -1)
        data = whole.reshape(-1)
    part.write(data.data)
