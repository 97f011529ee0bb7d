# SPDX-License-Identifier: Apache-2.0
"""Reads the blocks of a generation in the best order, and proves each.

Reads bypass the page cache if possible: a proof must concern the bytes on disk, not those
in the cache. While one window is in use, the next ones are being read and proven.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mpi_ckpt.errors import CorruptGenerationError
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.storage.format.manifest import Extents, StoredLeaves
from mpi_ckpt.storage.reading.read_plan import plan_reads
from mpi_ckpt.storage.reading.read_queue import SLOTS, ReadQueue, Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from mpi_ckpt.storage.format.manifest import StoredLeaf
    from mpi_ckpt.storage.reading.read_plan import DigestBlock, Window
    from mpi_ckpt.storage.reading.reader import GenerationReader

_WINDOW_BYTES = 16 << 20

Refuse: TypeAlias = "Callable[[DigestBlock, CorruptGenerationError], None]"
"""Told of a block that is not what was saved."""


class Refusal(NamedTuple):
    """A block that is not what was saved, and the error that says so."""

    block: DigestBlock
    problem: CorruptGenerationError


def read_proven(
    reader: GenerationReader,
    leaves: Sequence[StoredLeaf],
    windows: Sequence[Window],
    slots: Slots,
) -> ReadQueue[list[Refusal]]:
    """Start to read windows, and to compare each block with its saved digest.

    Not collective. Close the queue after use.

    Args:
        reader: The open generation.
        leaves: The leaves of the windows.
        windows: All or some of the windows that `plan_reads` made from their extents.
        slots: As for `ReadQueue`.

    Returns:
        The queue; the proof of a window is the list of its blocks that differ.
    """

    def prove(number: int, data: memoryview) -> list[Refusal]:
        window, refused = windows[number], []
        if isinstance(leaves, StoredLeaves) and _are_proven(leaves, window, data):
            return []
        for block in window.blocks:
            try:
                reader.prove(leaves[block.leaf], block.number, window.cut(data, block))
            except CorruptGenerationError as problem:
                refused.append(Refusal(block, problem))
        return refused

    return ReadQueue(reader, windows, prove, slots)


def _are_proven(leaves: StoredLeaves, window: Window, data: memoryview) -> bool:
    """Return whether all blocks of a window are what was saved; False if in doubt.

    All at once: blocks may be small, and many.
    """
    blocks, numbers = window.blocks, window.blocks.leaves
    if len(blocks) == 1 or not leaves.digests.several.keys().isdisjoint(numbers):
        return False
    starts, ends = ((run - window.start).tolist() for run in blocks.runs())
    pieces = map(data.__getitem__, map(slice, starts, ends))
    return b"".join(map(digest_bytes, pieces)) == leaves.digests.pick(numbers).wholes


def take_proven(queue: ReadQueue[list[Refusal]]) -> memoryview:
    """Return the bytes of the next window of `read_proven`; all of them are proven.

    Not collective. The bytes stay as those of `ReadQueue.take`.

    Raises:
        CorruptGenerationError: On the calling rank, for the first block that differs from
            the saved one, or a file that ends too early.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    data, refused = queue.take()
    for _, problem in refused:
        raise problem
    return data


def proven_blocks(
    reader: GenerationReader,
    leaves: Sequence[StoredLeaf],
    *,
    window_bytes: int = _WINDOW_BYTES,
    refuse: Refuse | None = None,
) -> Generator[tuple[DigestBlock, memoryview]]:
    """Yield the blocks of leaves, in the best order for reading.

    Not collective. Not thread-safe. Close the generator if you leave it before its end.

    Args:
        reader: The open generation.
        leaves: The leaves.
        window_bytes: How much to read at a time, in bytes; the memory is four times that.
        refuse: Called for each block that differs from the saved one; None raises.

    Returns:
        Each block, whose ``leaf`` is an index into ``leaves``, and its bytes, valid until
        the next one is requested.

    Raises:
        CorruptGenerationError: On the calling rank, for the first block that differs from
            the saved one, or a file that ends too early.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    if isinstance(leaves, StoredLeaves):
        extents = leaves.extents
    else:
        extents = Extents.of([leaf.extent for leaf in leaves])
    windows = plan_reads(
        extents,
        [file.name for file in reader.manifest.files],
        block_bytes=reader.manifest.block_bytes,
        window_bytes=window_bytes,
    )
    slots = Slots.of(windows, SLOTS * window_bytes)
    with closing(read_proven(reader, leaves, windows, slots)) as queue:
        for window in windows:
            if refuse is None:
                data = take_proven(queue)
            else:
                data, refused = queue.take()
                for block, problem in refused:
                    refuse(block, problem)
            queue.release()
            for block in window.blocks:
                yield block, window.cut(data, block)


def verify(reader: GenerationReader) -> None:
    """Prove every byte of a generation, and that tiles make up its cut leaves.

    Not collective.

    Raises:
        CorruptGenerationError: On the calling rank, for the first wrong byte.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    for _ in proven_blocks(reader, reader.leaves()):
        pass
