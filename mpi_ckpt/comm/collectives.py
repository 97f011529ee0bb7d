# SPDX-License-Identifier: Apache-2.0
"""Sends, averages and exchanges bytes, values and host buffers of any size.

MPI-3 libraries have counts of 32 bits, and some calls fail above 2 GiB, so no message is
larger than ``Communicator.message_bytes``.
"""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpi_ckpt.comm.broadcast import bcast_buffers
from mpi_ckpt.comm.rank_tree import Sends, receive
from mpi_ckpt.comm.topology import plan_messages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpi4py import MPI
    from numpy.typing import NDArray

    from mpi_ckpt.comm.communicator import Communicator

    Message = tuple[int, NDArray[np.uint8]]

# While a sum is awaited, the next ones are under way, and their memory is a few pieces.
_PIECE_BYTES = 4 << 20
_IN_FLIGHT = 4


def mean_buffers(comm: Communicator, arrays: Sequence[NDArray[Any]], doing: str) -> None:
    """Replace arrays by their averages over all ranks, in place.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        arrays: 1-d, contiguous, writable, of a float or complex dtype that MPI knows;
            the same on every rank.
        doing: What the ranks meet for, for the error if one never arrives.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    flying: deque[_Sum] = deque()

    def land() -> None:
        first = flying[0]
        # If one is given up, all in flight are: their memory must not be reused.
        comm.wait([first.request], doing, streaming=True, buffers=flying)
        flying.popleft()
        np.divide(first.result, comm.size, out=first.part)

    for part in _cut(arrays, min(_PIECE_BYTES, comm.message_bytes)):
        if len(flying) == _IN_FLIGHT:
            land()
        result = np.empty_like(part)
        flying.append(_Sum(part, result, comm.start_all_reduce(part, result, "sum")))
    while flying:
        land()
    comm.note_meeting(doing)


class _Sum(NamedTuple):
    """A sum under way: this rank's values, the sum of all ranks, the request."""

    part: NDArray[Any]
    result: NDArray[Any]
    request: MPI.Request


def _cut(arrays: Sequence[NDArray[Any]], nbytes: int) -> Iterator[NDArray[Any]]:
    for array in arrays:
        for (piece,) in plan_messages([array.nbytes], nbytes, unit=array.itemsize):
            yield array[piece.start // array.itemsize : piece.end // array.itemsize]


def bcast_bytes(comm: Communicator, data: bytes | None, doing: str) -> bytes:
    """Broadcast bytes of any length from root.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        data: The bytes on root; ignored elsewhere.
        doing: What the ranks meet for, for the error if one never arrives.

    Returns:
        Root's bytes, on every rank.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    length = np.zeros(1, np.int64)
    if comm.is_root:
        length[0] = len(data or b"")
    comm.wait([comm.handle.Ibcast(length, root=comm.root)], doing)
    buffer = bytearray(data or b"") if comm.is_root else bytearray(int(length[0]))
    bcast_buffers(comm, [memoryview(buffer)], doing)
    return bytes(buffer)


def bcast_json(comm: Communicator, value: Any, doing: str) -> Any:  # noqa: ANN401 (JSON)
    """Broadcast a JSON value from root.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        value: JSON value on root; ignored elsewhere.
        doing: What the ranks meet for, for the error if one never arrives.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    data = json.dumps(value).encode() if comm.is_root else None
    return json.loads(bcast_bytes(comm, data, doing))


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

    Collective. Main thread only. A rank sends log2 N messages, with what is not zero: to
    the ranks at distances 1, 2, 4 and so on, each of which passes on what is for others.

    Args:
        comm: The communicator.
        counts: Numbers for each rank, (n, size); n is the same on every rank.
        doing: What the ranks meet for, for the error if one never arrives.

    Returns:
        The numbers of each rank for this one, (n, size).

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    rank, size = comm.rank, comm.size
    rows, receivers = np.nonzero(counts)
    given = receivers, np.full(len(rows), rank), rows, counts[rows, receivers]
    here = np.stack(given, axis=1).astype(np.int64)
    for bit in range((size - 1).bit_length() if len(counts) else 0):
        # Each distance is a sum of such steps, in this order.
        goes_on = ((here[:, 0] - rank) % size >> bit & 1).astype(bool)
        sends = Sends(comm, doing)
        sends.start((rank + (1 << bit)) % size, here[goes_on].tobytes())
        (arrived,) = receive(comm, [(rank - (1 << bit)) % size], doing)
        sends.wait()
        more = np.frombuffer(arrived, np.int64).reshape(-1, 4)
        here = np.concatenate([here[~goes_on], more])
    theirs = np.zeros_like(counts)
    theirs[here[:, 2], here[:, 1]] = here[:, 3]
    return theirs
