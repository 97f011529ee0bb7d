# SPDX-License-Identifier: Apache-2.0
"""Host buffers of any size between ranks: broadcast, average, gather.

MPI counts are 32 bit on MPI-3 libraries and some calls fail above 2 GiB, so nothing is
sent in one message that is larger than ``Communicator.message_bytes``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm.communicator import ROOT
from mpi_ckpt.comm.pieces import plan_messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI
    from numpy.typing import NDArray

    from mpi_ckpt.comm.communicator import Communicator
    from mpi_ckpt.comm.pieces import Piece

__all__ = [
    "bcast_buffers",
    "bcast_bytes",
    "bcast_json",
    "gather_bytes",
    "mean_buffers",
]

# Broadcasts posted and not yet finished. All of a window are posted before any is waited
# for: 2 to 4 times a loop of blocking broadcasts, and immune to a busy Horovod thread.
_IN_FLIGHT = 16


def bcast_buffers(comm: Communicator, buffers: Sequence[memoryview], doing: str) -> None:
    """Broadcast buffers from root into those of the others, in place.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        buffers: C-contiguous bytes, writable off root; the same number and lengths on
            every rank.
        doing: What the ranks meet for, told when one does not come.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    if comm.size == 1:
        return
    arrays = [_as_array(buffer) for buffer in buffers]
    lengths = [len(array) for array in arrays]
    pending: list[tuple[MPI.Request, NDArray[np.uint8], tuple[Piece, ...]]] = []
    for message in plan_messages(lengths, comm.message_bytes):
        if len(pending) == _IN_FLIGHT:
            _finish(comm, pending, arrays, doing)
        packed = _pack(message, arrays, fill=comm.is_root)
        pending.append((comm.handle.Ibcast(packed, root=ROOT), packed, message))
    _finish(comm, pending, arrays, doing)


def mean_buffers(comm: Communicator, arrays: Sequence[NDArray[Any]], doing: str) -> None:
    """Replace arrays by their average over all ranks, in place.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        arrays: 1-d, contiguous, writable, of a float or complex dtype that MPI knows;
            the same on every rank.
        doing: What the ranks meet for, told when one does not come.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    for array in arrays:
        cuts = plan_messages([array.nbytes], comm.message_bytes, unit=array.itemsize)
        for (piece,) in cuts:
            part = array[piece.start // array.itemsize : piece.end // array.itemsize]
            part[:] = comm.all_reduce(part, "sum", doing) / comm.size


def bcast_bytes(comm: Communicator, data: bytes | None, doing: str) -> bytes:
    """Broadcast bytes of any length from root.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        data: The bytes on root; ignored elsewhere.
        doing: What the ranks meet for, told when one does not come.

    Returns:
        Root's bytes, on every rank.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    length = np.zeros(1, np.int64)
    if comm.is_root:
        length[0] = len(data or b"")
    comm.wait([comm.handle.Ibcast(length, root=ROOT)], doing)
    buffer = bytearray(data or b"") if comm.is_root else bytearray(int(length[0]))
    bcast_buffers(comm, [memoryview(buffer)], doing)
    return bytes(buffer)


def bcast_json(comm: Communicator, value: Any, doing: str) -> Any:  # noqa: ANN401 (JSON)
    """Broadcast a JSON value from root.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        value: JSON value on root; ignored elsewhere.
        doing: What the ranks meet for, told when one does not come.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    data = json.dumps(value).encode() if comm.is_root else None
    return json.loads(bcast_bytes(comm, data, doing))


def gather_bytes(comm: Communicator, data: bytes, doing: str) -> list[bytes]:
    """Collect bytes of any length from all ranks on root.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        data: This rank's bytes.
        doing: What the ranks meet for, told when one does not come.

    Returns:
        Bytes of each rank in rank order on root; an empty list elsewhere.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    length = np.array([len(data)], np.int64)
    lengths = np.zeros(comm.size if comm.is_root else 0, np.int64)
    comm.wait([comm.handle.Igather(length, lengths, root=ROOT)], doing)
    if not comm.is_root:
        mine = np.frombuffer(data, np.uint8)
        cuts = plan_messages([len(mine)], comm.message_bytes)
        sends = [comm.isend(mine[p.start : p.end], ROOT) for (p,) in cuts]
        comm.wait(sends, doing, streaming=True)
        return []
    gathered = [np.empty(int(n), np.uint8) for n in lengths]
    receives = [
        comm.irecv(gathered[rank][p.start : p.end], rank)
        for rank in range(comm.size)
        if rank != ROOT
        for (p,) in plan_messages([len(gathered[rank])], comm.message_bytes)
    ]
    comm.wait(receives, doing, streaming=True)
    return [data if rank == ROOT else a.tobytes() for rank, a in enumerate(gathered)]


def _as_array(buffer: memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(buffer, np.uint8)


def _pack(
    message: tuple[Piece, ...], arrays: Sequence[NDArray[np.uint8]], *, fill: bool
) -> NDArray[np.uint8]:
    if len(message) == 1:
        (piece,) = message
        return arrays[piece.buffer][piece.start : piece.end]
    bucket = np.empty(sum(piece.nbytes for piece in message), np.uint8)
    if fill:
        offset = 0
        for piece in message:
            bucket[offset : offset + piece.nbytes] = arrays[piece.buffer]
            offset += piece.nbytes
    return bucket


def _finish(
    comm: Communicator,
    pending: list[tuple[MPI.Request, NDArray[np.uint8], tuple[Piece, ...]]],
    arrays: Sequence[NDArray[np.uint8]],
    doing: str,
) -> None:
    comm.wait([request for request, _, _ in pending], doing, streaming=True)
    for _, packed, message in pending:
        if len(message) > 1 and not comm.is_root:
            offset = 0
            for piece in message:
                arrays[piece.buffer][:] = packed[offset : offset + piece.nbytes]
                offset += piece.nbytes
    pending.clear()
