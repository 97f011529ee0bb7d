# SPDX-License-Identifier: Apache-2.0
"""Sends leaves between ranks: root's to all, or the average of all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm import bcast_buffers, mean_buffers
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.buckets import join_leaves, plan_buckets, write_leaves
from mpi_ckpt.leaves.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator, Deferred
    from mpi_ckpt.leaves.leaf import Leaf

_DOING = "sending what differs"

# Smaller leaves are sent in buckets. A bucket is too large for the broadcast to join it
# with others again, and with few at a time their memory stays in the cache.
_SMALL_BYTES = 64 << 10
_BUCKET_BYTES = 2 << 20
_AT_ONCE = 2

_NATIVE = {"F64": "<f8", "F32": "<f4", "C64": "<c8", "C128": "<c16"}
# A complex half is two halves side by side, and so is a sum of complex halves.
_HALVES = ("F16", "C32")


def look_at(leaves: Sequence[Leaf], sizes: NDArray[np.int64]) -> None:
    """Look at the memory of the large leaves that will be sent. Not collective.

    An error then comes in a meeting, before the first byte moves.
    """
    for number in np.flatnonzero(sizes > _SMALL_BYTES).tolist():
        leaves[number].buffer.view()


def send_leaves(
    comm: Communicator,
    leaves: Sequence[Leaf],
    sizes: NDArray[np.int64],
    window_bytes: int,
    deferred: Deferred,
) -> None:
    """Send root's leaves into those of the other ranks, large ones in place if possible.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        leaves: Leaves with the same specs on every rank.
        sizes: The bytes of each.
        window_bytes: Limit of the memory for leaves that some rank must copy, because they
            are not contiguous host memory.
        deferred: Keeps failures to read or store bytes, for the next meeting.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    buckets = plan_buckets(sizes, _SMALL_BYTES, _BUCKET_BYTES)
    large = [
        _Addressee.of(leaves[first], deferred)
        for first, last in buckets
        if last - first == 1
    ]
    for batch in _batches(comm, large, window_bytes):
        _send_batch(comm, batch, deferred)
    small = [(leaves[i:j], int(sizes[i:j].sum())) for i, j in buckets if j - i > 1]
    _send_small(comm, small, deferred)


def _send_small(
    comm: Communicator, buckets: Sequence[tuple[Sequence[Leaf], int]], deferred: Deferred
) -> None:
    """Send small leaves, a few buckets at a time, always through the same memory.

    Args:
        comm: The communicator.
        buckets: The leaves of each, and their bytes together.
        deferred: As for `send_leaves`.
    """
    memory = memoryview(bytearray(_AT_ONCE * _BUCKET_BYTES if buckets else 0))
    move = join_leaves if comm.is_root else write_leaves
    for start in range(0, len(buckets), _AT_ONCE):
        batch, end = [], 0
        for leaves, nbytes in buckets[start : start + _AT_ONCE]:
            batch.append((leaves, memory[end : end + nbytes]))
            end += nbytes
        # What root cannot read is sent as whatever the memory holds, and fails later.
        moves = [partial(move, *pair) for pair in batch]
        if comm.is_root:
            list(map(deferred.attempt, moves))
        bcast_buffers(comm, [place for _, place in batch], _DOING)
        if not comm.is_root:
            list(map(deferred.attempt, moves))


def _read(leaves: Sequence[Leaf], nbytes: int, deferred: Deferred) -> memoryview:
    """Return the bytes of leaves, one after the other; zeros if they cannot be read."""
    found: list[memoryview] = []

    def read() -> None:
        if len(leaves) == 1:
            found.append(leaves[0].buffer.read())
        else:
            memory = memoryview(bytearray(nbytes))
            join_leaves(leaves, memory)
            found.append(memory)

    deferred.attempt(read)
    return found[0] if found else memoryview(bytes(nbytes))


@dataclass(frozen=True, slots=True)
class _Addressee:
    """A leaf, and the memory that receives it on this rank."""

    leaf: Leaf
    target: Target

    @classmethod
    def of(cls, leaf: Leaf, deferred: Deferred) -> _Addressee:
        found = [Target(leaf.spec, None)]
        deferred.attempt(lambda: found.append(Target(leaf.spec, leaf)))
        return cls(leaf, found[-1])

    def finish(self) -> None:
        try:
            self.target.finish()
        except Exception:
            with concerning(f"leaf {self.leaf.spec.name!r}"):
                raise


def _batches(
    comm: Communicator, leaves: Sequence[_Addressee], window_bytes: int
) -> Iterator[list[_Addressee]]:
    """Group leaves so that private copies of a group stay within the window."""
    if not leaves:
        return
    copied = np.array([one.target.is_private for one in leaves], np.uint8)
    # If one rank needs a copy, the group ends on all ranks: messages must match.
    copied = comm.all_reduce(copied, "max", _DOING)
    batch: list[_Addressee] = []
    filled = 0
    for one, is_copied in zip(leaves, copied, strict=True):
        nbytes = one.leaf.spec.nbytes if is_copied else 0
        if batch and filled + nbytes > window_bytes:
            yield batch
            batch, filled = [], 0
        batch.append(one)
        filled += nbytes
    yield batch


def _send_batch(
    comm: Communicator, batch: Sequence[_Addressee], deferred: Deferred
) -> None:
    if comm.is_root:
        data = [_read([one.leaf], one.leaf.spec.nbytes, deferred) for one in batch]
        bcast_buffers(comm, data, _DOING)
        return
    bcast_buffers(comm, [one.target.memory() for one in batch], _DOING)
    for one in batch:
        deferred.attempt(one.finish)


def average_leaves(comm: Communicator, leaves: Sequence[Leaf], deferred: Deferred) -> None:
    """Replace leaves by their averages over all ranks: small ones of a dtype at a time.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        leaves: Leaves of floating dtypes with the same specs on every rank.
        deferred: Keeps failures to read leaves or store averages, for the next meeting.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    ordered = sorted(leaves, key=lambda leaf: leaf.spec.dtype)
    for dtype, group in groupby(ordered, key=lambda leaf: leaf.spec.dtype):
        alike = list(group)
        sizes = np.array([leaf.spec.nbytes for leaf in alike], np.int64)
        for first, last in plan_buckets(sizes, _SMALL_BYTES, _BUCKET_BYTES):
            bucket, nbytes = alike[first:last], int(sizes[first:last].sum())
            array = to_summable(dtype, _read(bucket, nbytes, deferred))
            mean_buffers(comm, [array], "averaging what differs")
            deferred.attempt(partial(_write_average, bucket, array))


def _write_average(leaves: Sequence[Leaf], array: NDArray[Any]) -> None:
    average = from_summable(leaves[0].spec.dtype, array)
    if len(leaves) == 1:
        leaves[0].buffer.write(average)
    else:
        write_leaves(leaves, average)


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
