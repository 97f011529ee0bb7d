# SPDX-License-Identifier: Apache-2.0
"""Brings leaves that are cut over ranks, in the files or in the program, to their places.

Each saved byte is read by one rank, once, and proven before it is sent or stored.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack, closing
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpi_ckpt.comm import UNTOUCHED, agree, exchange_counts, exchange_messages
from mpi_ckpt.decomposition.regions import elements_of
from mpi_ckpt.engine.restore.cut.copied_tiles import CopiedWindows, held_memories
from mpi_ckpt.engine.restore.cut.wanted import tiles_here
from mpi_ckpt.engine.restore.matching import OVERWRITTEN
from mpi_ckpt.errors import CorruptGenerationError, ReadError, RestoreError
from mpi_ckpt.failures import concerning
from mpi_ckpt.states.distributed.concat import ConcatState
from mpi_ckpt.states.leaf_values import memory_leaf
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.reading.file_reader import FileReader
from mpi_ckpt.storage.reading.read_plan import Window
from mpi_ckpt.storage.reading.read_queue import ReadQueue, Slots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator, Deferred
    from mpi_ckpt.decomposition.rank_plan import Incoming, Outgoing, Staying, Turn
    from mpi_ckpt.decomposition.regions import Regions
    from mpi_ckpt.engine.restore.cut.trade_plan import Trade, Trades
    from mpi_ckpt.engine.restore.cut.wanted import TradedTile
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.leaves.leaf import Buffer
    from mpi_ckpt.reports import Progress


def route_rows(
    comm: Communicator, match: StateMatch, window_bytes: int, deferred: Deferred
) -> None:
    """Send the rows of states with a ``route`` to their ranks, in the order of the file.

    Collective. Main thread only. All rows have arrived, in equal shares, in memory that the
    states have not taken over yet; so there are two copies of a state's rows for a while.

    Args:
        comm: The communicator.
        match: The restored states.
        window_bytes: Limit of the bytes that a rank sends at a time.
        deferred: Keeps failures of the transfer, and of storing rows.

    Raises:
        RestoreError: On every rank, if a ``route`` fails on any, or returns no rank.
    """
    for matched in match.states:
        state = matched.state
        if isinstance(state, ConcatState) and matched.saved.cut:
            ranks = _ask(comm, state, deferred)
            if ranks is not None:
                _exchange(comm, state, ranks, window_bytes, deferred)


def _ask(
    comm: Communicator, state: ConcatState, deferred: Deferred
) -> NDArray[np.intp] | None:
    """Return the rank of each row of this rank, None if the state has no route."""

    def ask() -> NDArray[np.intp] | None:
        deferred.raise_failure()
        return None if state.route is None else state.routed(state.arriving)

    doing = f"asking for the ranks of the rows of state {state.name!r}"
    return agree(comm, doing, ask, error=RestoreError, safe=OVERWRITTEN)


class _RowBytes(NamedTuple):
    """The bytes of a column before and after, a row each, and the memory that they fill."""

    before: NDArray[np.uint8]
    after: NDArray[np.uint8]
    buffer: Buffer


def _exchange(
    comm: Communicator,
    state: ConcatState,
    ranks: NDArray[np.intp],
    window_bytes: int,
    deferred: Deferred,
) -> None:
    """Exchange all rows of a state, some rows of each rank at a time.

    Each rank sends its rows in their order, and a receiver has room for the rows of each
    sender in rank order: that is the order of the file.
    """
    doing = f"sending the rows of state {state.name!r}"
    columns = [memory_leaf(key, column) for key, column in state.arriving.items()]
    row_bytes = sum(leaf.spec.nbytes for leaf in columns) // max(1, len(ranks))
    most = max(1, window_bytes // 2 // max(1, row_bytes))
    rounds = int(comm.all_reduce(np.array([-(-len(ranks) // most)]), "max", doing)[0])
    pieces = [ranks[n * most : (n + 1) * most] for n in range(rounds)]
    sent = np.array([np.bincount(piece, minlength=comm.size) for piece in pieces], np.int64)
    received = exchange_counts(comm, sent.reshape(rounds, comm.size), doing)
    made = state.make_columns(int(received.sum()))
    moved = [_column(key, old, made[key]) for key, old in state.arriving.items()]
    ends = np.cumsum(received.sum(axis=0))
    filled = ends - received.sum(axis=0)
    for number, piece in enumerate(pieces):
        order = np.argsort(piece, kind="stable") + number * most
        places = (filled, received[number])
        for column in moved:
            _send_column(comm, doing, column, order, sent[number], places)
        filled += received[number]

    def store() -> None:
        for column in moved:
            if column.buffer.view() is None:
                with concerning(f"state {state.name!r}"):
                    column.buffer.write(column.after.reshape(-1).data)
        state.arriving = made

    deferred.attempt(store)


def _column(key: str, column: Any, made: Any) -> _RowBytes:  # noqa: ANN401 (arrays)
    """Return a column's rows as bytes, and the memory for those that come."""
    old, new = memory_leaf(key, column), memory_leaf(key, made)
    live = new.buffer.view()
    before = np.frombuffer(old.buffer.read(), np.uint8)
    after = np.empty(new.spec.nbytes, np.uint8)
    if live is not None:
        after = np.frombuffer(live, np.uint8)
    return _RowBytes(
        before.reshape(old.spec.shape[0], -1) if before.size else before.reshape(0, 0),
        after.reshape(new.spec.shape[0], -1) if after.size else after.reshape(0, 0),
        new.buffer,
    )


def _send_column(
    comm: Communicator,
    doing: str,
    column: _RowBytes,
    order: NDArray[np.intp],
    sent: NDArray[np.int64],
    places: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> None:
    """Send rows of a column, in the order of ranks, so many to each; receive others.

    ``places`` are the first row and the number of rows that come of each rank.
    """
    packed = column.before[order] if column.before.size else column.before
    ends = np.cumsum(sent)
    sends = [
        (rank, packed[end - count : end].reshape(-1))
        for rank, (end, count) in enumerate(zip(ends, sent, strict=True))
        if count and packed.size
    ]
    receives = [
        (rank, column.after[first : first + count].reshape(-1))
        for rank, (first, count) in enumerate(zip(*places, strict=True))
        if count and column.after.size
    ]
    exchange_messages(comm, sends, receives, doing)


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
            Window(trade.files[file], start, end)
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
