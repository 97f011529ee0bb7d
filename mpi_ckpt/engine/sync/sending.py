# SPDX-License-Identifier: Apache-2.0
"""Sends leaves between ranks: root's to all, or the average of all."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm import bcast_buffers, mean_buffers
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaf import Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator, Deferred
    from mpi_ckpt.leaf import Leaf

_NATIVE = {"F64": "<f8", "F32": "<f4", "C64": "<c8", "C128": "<c16"}
# A complex half is two halves side by side, and so is a sum of complex halves.
_HALVES = ("F16", "C32")


def send_leaves(
    comm: Communicator, leaves: Sequence[Leaf], window_bytes: int, deferred: Deferred
) -> None:
    """Send root's leaves into those of the other ranks, in place if possible.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        leaves: Leaves with the same specs on every rank.
        window_bytes: Limit of the memory for leaves that some rank must copy, because they
            are not contiguous host memory.
        deferred: Keeps failures to store bytes, for the next meeting.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    for batch in _batches(comm, leaves, window_bytes):
        _send_batch(comm, batch, deferred)


def _batches(
    comm: Communicator, leaves: Sequence[Leaf], window_bytes: int
) -> Iterator[list[Leaf]]:
    """Group leaves so that private copies of a group stay within the window."""
    if not leaves:
        return
    copied = np.array([leaf.buffer.view() is None for leaf in leaves], np.uint8)
    # If one rank needs a copy, the group ends on all ranks: messages must match.
    copied = comm.all_reduce(copied, "max", "sending what differs")
    batch: list[Leaf] = []
    filled = 0
    for leaf, is_copied in zip(leaves, copied, strict=True):
        nbytes = leaf.spec.nbytes if is_copied else 0
        if batch and filled + nbytes > window_bytes:
            yield batch
            batch, filled = [], 0
        batch.append(leaf)
        filled += nbytes
    yield batch


def _send_batch(comm: Communicator, leaves: Sequence[Leaf], deferred: Deferred) -> None:
    doing = "sending what differs"
    if comm.is_root:
        bcast_buffers(comm, [leaf.buffer.read() for leaf in leaves], doing)
        return
    targets = [Target(leaf.spec, leaf) for leaf in leaves]
    bcast_buffers(comm, [target.memory() for target in targets], doing)
    deferred.attempt(partial(_finish, leaves, targets))


def _finish(leaves: Sequence[Leaf], targets: Sequence[Target]) -> None:
    for leaf, target in zip(leaves, targets, strict=True):
        try:
            target.finish()
        except Exception:
            with concerning(f"leaf {leaf.spec.name!r}"):
                raise


def average_leaves(comm: Communicator, leaves: Sequence[Leaf], deferred: Deferred) -> None:
    """Replace leaves by their averages over all ranks, one leaf after the other.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        leaves: Leaves of floating dtypes with the same specs on every rank.
        deferred: Keeps failures to store averages, for the next meeting.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    for leaf in leaves:
        array = to_summable(leaf.spec.dtype, leaf.buffer.read())
        mean_buffers(comm, [array], "averaging what differs")
        average = from_summable(leaf.spec.dtype, array)
        deferred.attempt(partial(leaf.buffer.write, average))


def to_summable(dtype: str, data: memoryview) -> NDArray[Any]:
    """Return a leaf's bytes as a writable array of a dtype that MPI adds.

    Not collective. Thread-safe.

    Args:
        dtype: One of ``dtypes.FLOATING``.
        data: The bytes; copied.

    Returns:
        1-d; half-precision types become float32.
    """
    summable: NDArray[Any]
    if dtype in _NATIVE:
        summable = np.frombuffer(data, _NATIVE[dtype]).copy()
    elif dtype in _HALVES:
        summable = np.frombuffer(data, "<f2").astype(np.float32)
    else:
        # bfloat16 is the upper half of a float32.
        halves = np.frombuffer(data, "<u2").astype(np.uint32)
        summable = (halves << np.uint32(16)).view(np.float32)
    return summable


def from_summable(dtype: str, array: NDArray[Any]) -> memoryview:
    """Return the bytes of a leaf from an array that `to_summable` made.

    Not collective. Thread-safe. Half-precision types are rounded to nearest even.
    """
    if dtype in _NATIVE:
        plain = array
    elif dtype in _HALVES:
        plain = array.astype("<f2")
    else:
        bits = array.view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = ((bits + half) >> np.uint32(16)).astype("<u2")
        # Rounding would turn a NaN with all bits set into zero.
        plain = np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
    return np.ascontiguousarray(plain).view(np.uint8).data
