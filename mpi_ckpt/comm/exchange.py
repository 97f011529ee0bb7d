# SPDX-License-Identifier: Apache-2.0
"""Exchanges messages between pairs of ranks, all lengths known on both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm.topology import plan_messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI
    from numpy.typing import NDArray

    from mpi_ckpt.comm.communicator import Communicator

    Message = tuple[int, NDArray[np.uint8]]


def exchange_messages(
    comm: Communicator, sends: Sequence[Message], receives: Sequence[Message], doing: str
) -> None:
    """Send messages to some ranks and receive messages of others.

    Not collective: called on all ranks that send or receive. Main thread only.

    Args:
        comm: The communicator.
        sends: Ranks, and the bytes for each.
        receives: Ranks, and the memory for the bytes of each. A message has the length that
            its sender gives, and two ranks exchange several messages in one order.
        doing: What the ranks meet for, for the error if one never arrives.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    most = comm.message_bytes
    # Receives first: a message that finds its memory is not copied on the way.
    requests = [
        comm.irecv(memory[piece.start : piece.end], rank)
        for rank, memory in receives
        for (piece,) in plan_messages([len(memory)], most)
    ]
    requests += start_sending(comm, sends)
    if requests:
        comm.wait(requests, doing, streaming=True, buffers=(sends, receives))


def start_sending(comm: Communicator, sends: Sequence[Message]) -> list[MPI.Request]:
    """Start to send messages that other ranks receive by `exchange_messages`.

    Not collective. Main thread only. The bytes must stay as they are until the caller has
    waited for the requests.

    Args:
        comm: The communicator.
        sends: Ranks, and the bytes for each.
    """
    return [
        comm.isend(data[piece.start : piece.end], rank)
        for rank, data in sends
        for (piece,) in plan_messages([len(data)], comm.message_bytes)
    ]


def exchange_counts(
    comm: Communicator, counts: NDArray[np.int64], doing: str
) -> NDArray[np.int64]:
    """Tell each rank some numbers of its own.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        counts: Numbers for each rank, (n, size); n is the same on every rank.
        doing: What the ranks meet for, for the error if one never arrives.

    Returns:
        The numbers of each rank for this one, (n, size).

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    mine = np.ascontiguousarray(counts.T)
    theirs = np.empty_like(mine)
    if counts.size:
        request = comm.handle.Ialltoall(mine, theirs)
        comm.wait([request], doing, buffers=(mine, theirs))
    return np.ascontiguousarray(theirs.T)
