# SPDX-License-Identifier: Apache-2.0
"""Handles small leaves by the thousand: in buckets, without a step of Python for each.

A bucket is a run of consecutive small leaves. All loops over its leaves are those of C
code: of ``map``, ``bytes.join``, NumPy.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np

from mpi_ckpt.failures import concerning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

__all__ = [
    "Leaves",
    "Readable",
    "are_read_together",
    "find_spans",
    "fingerprint_leaves",
    "join_leaves",
    "pieces_of",
    "plan_buckets",
    "read_leaves",
    "write_leaves",
]

Readable: TypeAlias = Any
"""Contiguous bytes, which ``bytes.join`` and xxhash take: a memoryview, bytes, an array."""


class _HasBuffer(Protocol):
    """A `Leaf`, of which this layer knows no more."""

    @property
    def spec(self) -> Any: ...  # noqa: ANN401

    @property
    def buffer(self) -> Any: ...  # noqa: ANN401


AnyLeaf = TypeVar("AnyLeaf", bound="_HasBuffer")


class Leaves(tuple[AnyLeaf, ...]):
    """Leaves that are read from save to save: what is asked of all of them is kept."""

    @cached_property
    def buffers(self) -> list[Any]:
        """The buffer of each."""
        return [leaf.buffer for leaf in self]

    @cached_property
    def kind(self) -> Any:  # noqa: ANN401
        """The kind of their buffers, if it is one; else None."""
        return _kind_of(self.buffers)


def plan_buckets(
    sizes: NDArray[np.int64], small_bytes: int, bucket_bytes: int
) -> list[tuple[int, int]]:
    """Fuse consecutive small runs of bytes; leave each large one alone.

    Not collective. Thread-safe. Pure.

    Args:
        sizes: Length of each run in bytes.
        small_bytes: Largest run that is fused.
        bucket_bytes: Largest bucket in bytes; at least ``small_bytes``.

    Returns:
        The first index of each bucket, and one past its last, in order.
    """
    if not len(sizes):
        return []
    ends = np.cumsum(sizes)
    large = np.flatnonzero(sizes > small_bytes)
    edges = np.unique(np.concatenate([[0], large, large + 1, [len(sizes)]])).tolist()
    buckets = []
    for start, stop in pairwise(edges):
        first = start
        while first < stop:
            most = (ends[first - 1] if first else 0) + bucket_bytes
            fitting = int(np.searchsorted(ends[first:stop], most, side="right"))
            buckets.append((first, first + max(1, fitting)))
            first += max(1, fitting)
    return buckets


def read_leaves(
    leaves: Sequence[_HasBuffer], first: int = 0, last: int | None = None
) -> Sequence[Readable]:
    """Return the bytes of leaves: live ones where possible, else copies.

    Not collective. A kind of buffer that has ``read_all`` reads them at once.

    Args:
        leaves: Whole leaves.
        first: The first of them to read.
        last: One past the last; None for all that follow.
    """
    if isinstance(leaves, Leaves):
        buffers, kind = leaves.buffers[first:last], leaves.kind
    else:
        buffers = [leaf.buffer for leaf in leaves[first:last]]
        kind = _kind_of(buffers)
    read_all = getattr(kind, "read_all", None)
    return read_all(buffers) if read_all else [buffer.read() for buffer in buffers]


def fingerprint_leaves(leaves: Sequence[_HasBuffer]) -> list[bytes] | None:
    """Return a fingerprint of each leaf, 16 bytes, made where its bytes are.

    Not collective.

    Args:
        leaves: Whole leaves of one kind of buffer, which has ``fingerprint_all``.

    Returns:
        None if there is no memory for it.
    """
    buffers: Any = [leaf.buffer for leaf in leaves]
    found: list[bytes] | None = buffers[0].fingerprint_all(buffers)
    return found


def pieces_of(leaf: _HasBuffer) -> Iterator[memoryview] | None:
    """Return the bytes of a leaf piece by piece, the next of which come meanwhile.

    Not collective.

    Returns:
        None for leaves that are at hand, or come in one piece. A piece is overwritten once
        the next one has been asked for.
    """
    pieces = getattr(leaf.buffer, "pieces", None)
    return None if pieces is None else pieces()


def are_read_together(leaves: Sequence[_HasBuffer]) -> bool:
    """Return whether `read_leaves` reads leaves at once, and may do so again.

    Not collective. Leaves that arrive from elsewhere can be read only once.
    """
    return _of_all([leaf.buffer for leaf in leaves], "read_all") is not None


def join_leaves(leaves: Sequence[_HasBuffer], target: memoryview) -> None:
    """Copy the bytes of leaves to memory, one after the other.

    Not collective. A kind of buffer that has ``join_all`` copies them at once.

    Args:
        leaves: Whole leaves.
        target: As long as all of them. Memory that is used again: fresh memory for each
            bucket costs several times the copy, since the system clears its pages.
    """
    join_all = _of_all([leaf.buffer for leaf in leaves], "join_all")
    if not (join_all and join_all([leaf.buffer for leaf in leaves], target)):
        target[:] = b"".join(read_leaves(leaves))


def write_leaves(leaves: Sequence[_HasBuffer], data: memoryview) -> None:
    """Replace the bytes of leaves by bytes that follow one another.

    Not collective. A kind of buffer that has ``write_all`` writes them at once.

    Args:
        leaves: Whole leaves.
        data: As long as all of them.
    """
    buffers = [leaf.buffer for leaf in leaves]
    write_all = _of_all(buffers, "write_all")
    if write_all and write_all(buffers, data):
        return
    end = 0
    try:
        for leaf in leaves:
            start, end = end, end + leaf.spec.nbytes
            view = leaf.buffer.view()
            if view is None:
                leaf.buffer.write(data[start:end])
            else:
                view[:] = data[start:end]
    except Exception:
        with concerning(f"leaf {leaf.spec.name!r}"):
            raise


def find_spans(leaves: Sequence[_HasBuffer | None]) -> NDArray[np.uint64]:
    """Return the first byte of each leaf, and one past its last; two zeros for none.

    Not collective. A kind of buffer that has ``span_all`` finds them at once.
    """
    buffers = [None if leaf is None else leaf.buffer for leaf in leaves]
    span_all = _of_all(buffers, "span_all")
    found: NDArray[np.uint64] | None = span_all(buffers) if span_all else None
    if found is not None:
        return found
    spans = [(0, 0) if buffer is None else buffer.span() for buffer in buffers]
    flat = np.fromiter(chain.from_iterable(spans), np.uint64, 2 * len(spans))
    return flat.reshape(-1, 2)


def _of_all(buffers: Sequence[Any], function: str) -> Callable[..., Any] | None:
    """Return a function of the kind of buffers for many of them, if all are of one kind."""
    return getattr(_kind_of(buffers), function, None)


def _kind_of(buffers: Sequence[Any]) -> Any:  # noqa: ANN401
    kinds = set(map(type, buffers))
    return kinds.pop() if len(kinds) == 1 else None
