# SPDX-License-Identifier: Apache-2.0
"""Sends restored rows on to the ranks that the program's ``route`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mpi_ckpt.comm import agree, exchange_counts, exchange_messages
from mpi_ckpt.engine.restore.matching import OVERWRITTEN
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.failures import concerning
from mpi_ckpt.states.distributed.concat import ConcatState
from mpi_ckpt.states.leaf_values import memory_leaf

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator, Deferred
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.leaves.leaf import Buffer


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
