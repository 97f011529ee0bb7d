# SPDX-License-Identifier: Apache-2.0
"""In which order a generation is read: long runs of its files, a window at a time. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

__all__ = ["Batch", "Piece", "Place", "Span", "plan_reads"]

# Bytes between two leaves that are read along rather than skipped.
_GAP_BYTES = 1 << 20

# Smaller pieces that follow one another are sent as one: copying them costs less than
# handling each.
_FUSED_BYTES = 256 << 10


# Named tuples, not dataclasses: thousands are made at a time, in a fifth of the time.
class Place(NamedTuple):
    """Where a leaf lies: number of the file, offset and length in bytes."""

    file: int
    offset: int
    nbytes: int


class Piece(NamedTuple):
    """One block of one leaf, as it is read and proven.

    Attributes:
        leaf: Index of the leaf.
        block: Index of the block in the leaf.
        start: First byte of the block in the leaf.
        end: One past its last byte in the leaf.
        offset: Offset of the block in the file.
        last: Whether it is the leaf's last.
    """

    leaf: int
    block: int
    start: int
    end: int
    offset: int
    last: bool

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Span:
    """Pieces that lie side by side and are sent as one: start and end in the file."""

    start: int
    end: int
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class Batch:
    """A run of a file: number of the file, start and end in bytes, and the pieces in it."""

    file: int
    start: int
    end: int
    pieces: Sequence[Piece]

    def spans(self) -> list[Span]:
        """Return what is sent as one, in order. Not collective. Thread-safe.

        Large pieces stand alone, so that each can arrive where it belongs.
        """
        groups: list[list[Piece]] = []
        end = -1
        for piece in self.pieces:
            length = piece.end - piece.start
            is_small = length < _FUSED_BYTES
            if not is_small or piece.offset != end:
                groups.append([])
            groups[-1].append(piece)
            end = piece.offset + length if is_small else -1
        return [
            Span(group[0].offset, group[-1].offset + group[-1].nbytes, group)
            for group in groups
        ]


def plan_reads(
    places: Sequence[Place], *, block_bytes: int, window_bytes: int
) -> list[Batch]:
    """Order the blocks of leaves by file and offset, and group them.

    Not collective. Thread-safe. The same places give the same plan on every rank.

    Args:
        places: Where each leaf lies; no two overlap.
        block_bytes: Block length of the generation.
        window_bytes: Most bytes of a batch, unless a single block has more.
    """
    if not places:
        return []
    files, offsets, lengths = np.array(places, np.int64).T
    # An empty leaf shares its offset with the one behind it and must come before that.
    order = np.lexsort((lengths, offsets, files))
    blocks = np.maximum(1, -(-lengths[order] // block_bytes))
    leaves = np.repeat(order, blocks)
    block = np.arange(len(leaves)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    start = block * block_bytes
    end = np.minimum(start + block_bytes, lengths[leaves])
    offset = offsets[leaves] + start
    columns = (leaves, block, start, end, offset, end == lengths[leaves])
    pieces = [Piece(*one) for one in zip(*(c.tolist() for c in columns), strict=True)]
    until = offset + end - start
    return [
        Batch(int(files[leaves[i]]), int(offset[i]), int(until[j - 1]), pieces[i:j])
        for i, j in _group(files[leaves], offset, until, window_bytes)
    ]


def _group(
    files: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    window_bytes: int,
) -> Iterator[tuple[int, int]]:
    """Cut pieces in file order into batches: index of the first, one past the last."""
    apart = (np.diff(files) != 0) | (starts[1:] - ends[:-1] > _GAP_BYTES)
    first = 0
    for stop in [*(np.flatnonzero(apart) + 1).tolist(), len(starts)]:
        while first < stop:
            most = starts[first] + window_bytes
            fitting = int(np.searchsorted(ends[first:stop], most, side="right"))
            yield first, first + max(1, fitting)
            first += max(1, fitting)
