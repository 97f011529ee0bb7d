# SPDX-License-Identifier: Apache-2.0
"""Plans the order of reads of a generation: long runs, a window at a time. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from mpi_ckpt.storage.format.manifest import Extents

# Gaps between leaves up to this size are read rather than skipped.
_GAP_BYTES = 1 << 20

# Adjacent smaller blocks are sent as one message: copying them costs less than handling
# each.
_FUSED_BYTES = 256 << 10


class DigestBlock(NamedTuple):
    """One block of one leaf, as it is read and proven.

    Attributes:
        leaf: Index of the leaf.
        number: Index of the block in the leaf.
        start: First byte of the block in the leaf.
        end: One past the block's last byte in the leaf.
        offset: Offset of the block in the file.
        is_last: Whether it is the leaf's last block.
    """

    leaf: int
    number: int
    start: int
    end: int
    offset: int
    is_last: bool

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


class Blocks(Sequence[DigestBlock]):
    """Blocks in columns, from whose values a `DigestBlock` is made when it is asked for.

    Not collective. Thread-safe.

    Args:
        columns: A row for each attribute of a block, in their order.
    """

    __slots__ = ("columns",)

    def __init__(self, columns: NDArray[np.int64]) -> None:
        self.columns = columns

    @property
    def leaves(self) -> list[int]:
        """The index of each one's leaf."""
        found: list[int] = self.columns[0].tolist()
        return found

    @property
    def are_leaves(self) -> bool:
        """Whether each is a whole leaf."""
        _, _, starts, _, _, are_last = self.columns
        return bool(are_last.all() and not starts.any())

    def runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where each starts and ends in the file, in bytes."""
        _, _, starts, ends, offsets, _ = self.columns
        return offsets, offsets + ends - starts

    def __len__(self) -> int:
        return len(self.columns[0])

    @overload
    def __getitem__(self, index: int) -> DigestBlock: ...

    @overload
    def __getitem__(self, index: slice) -> Blocks: ...

    def __getitem__(self, index: int | slice) -> DigestBlock | Blocks:
        if isinstance(index, slice):
            return Blocks(self.columns[:, index])
        number = range(len(self))[index]
        return next(iter(self[number : number + 1]))

    def __iter__(self) -> Iterator[DigestBlock]:
        *numbers, are_last = self.columns.tolist()
        return map(DigestBlock, *numbers, map(bool, are_last))


NO_BLOCKS = Blocks(np.empty((6, 0), np.int64))


@dataclass(frozen=True, slots=True)
class Window:
    """One read: name of the file, start and end in bytes, the blocks in it."""

    file: str
    start: int
    end: int
    blocks: Blocks = NO_BLOCKS

    def cut(self, data: memoryview, block: DigestBlock) -> memoryview:
        """Return a block's bytes from the window's. Not collective. Thread-safe."""
        start = block.offset - self.start
        return data[start : start + block.end - block.start]

    def groups(self) -> list[Blocks]:
        """Return the blocks of each message, in order. Not collective. Thread-safe.

        A large block is a message of its own, so that it can arrive in its destination;
        adjacent small blocks share one.
        """
        starts, ends = self.blocks.runs()
        is_large = ends - starts >= _FUSED_BYTES
        is_cut = (starts[1:] != ends[:-1]) | is_large[1:] | is_large[:-1]
        edges = [0, *(np.flatnonzero(is_cut) + 1).tolist(), len(self.blocks)]
        return [self.blocks[first:last] for first, last in pairwise(edges)]


def plan_reads(
    extents: Extents, files: Sequence[str], *, block_bytes: int, window_bytes: int
) -> list[Window]:
    """Order the blocks of leaves by file and offset, and group them.

    Not collective. Thread-safe. The same extents give the same plan on every rank.

    Args:
        extents: The position of each leaf; no two overlap.
        files: Names of the files, in the order in which they are read.
        block_bytes: Block length of the generation.
        window_bytes: Largest window in bytes, unless a single block is larger.
    """
    if not extents:
        return []
    file, offsets, lengths = extents.numbered(files), extents.offsets, extents.sizes
    # An empty leaf has the offset of the next leaf and must come before it.
    order = np.lexsort((lengths, offsets, file))
    counts = np.maximum(1, -(-lengths[order] // block_bytes))
    leaves = np.repeat(order, counts)
    number = np.arange(len(leaves)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * block_bytes
    end = np.minimum(start + block_bytes, lengths[leaves])
    offset = offsets[leaves] + start
    is_last = (end == lengths[leaves]).astype(np.int64)
    blocks = Blocks(np.stack([leaves, number, start, end, offset, is_last]))
    until = offset + end - start
    return [
        Window(files[file[leaves[i]]], int(offset[i]), int(until[j - 1]), blocks[i:j])
        for i, j in _group(file[leaves], offset, until, window_bytes)
    ]


def _group(
    files: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    window_bytes: int,
) -> Iterator[tuple[int, int]]:
    """Cut blocks in file order into windows: index of the first, one past the last."""
    is_gap = (np.diff(files) != 0) | (starts[1:] - ends[:-1] > _GAP_BYTES)
    first = 0
    for stop in [*(np.flatnonzero(is_gap) + 1).tolist(), len(starts)]:
        while first < stop:
            most = starts[first] + window_bytes
            fitting = int(np.searchsorted(ends[first:stop], most, side="right"))
            yield first, first + max(1, fitting)
            first += max(1, fitting)
