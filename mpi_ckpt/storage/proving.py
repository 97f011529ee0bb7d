# SPDX-License-Identifier: Apache-2.0
"""The bytes of a generation in the order in which they are read best, each block proven.

Read around the page cache where that is possible: what the cache holds says nothing of
what the disk does, and a proof should.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, TypeAlias

from mpi_ckpt.errors import CorruptGenerationError
from mpi_ckpt.storage.prefetch import Prefetcher
from mpi_ckpt.storage.read_plan import plan_reads

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from mpi_ckpt.storage.manifest import StoredLeaf
    from mpi_ckpt.storage.read_plan import Block, Window
    from mpi_ckpt.storage.reader import GenerationReader

__all__ = ["Refuse", "proven_blocks", "proven_windows", "verify"]

_WINDOW_BYTES = 32 << 20

Refuse: TypeAlias = "Callable[[Block, CorruptGenerationError], None]"
"""Told of a block that is not what was saved."""


def proven_windows(
    reader: GenerationReader,
    leaves: Sequence[StoredLeaf],
    windows: Sequence[Window],
    refuse: Refuse | None = None,
) -> Generator[memoryview]:
    """Give the bytes of windows, in order, each while the next is being read.

    Not collective. Not thread-safe. Close it when it is left before its end.

    Args:
        reader: The open generation.
        leaves: Those that the windows are of.
        windows: What `plan_reads` made of their extents, or some of it.
        refuse: Told of each block that is not what was saved; None raises.

    Returns:
        The bytes of each window, good until the next is asked for.

    Raises:
        CorruptGenerationError: On the calling rank, for the first block that is not what
            was saved, or a file that ends too early.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    with closing(Prefetcher(reader, windows)) as prefetcher:
        for window in windows:
            data = prefetcher.take()
            for block in window.blocks:
                try:
                    reader.prove(leaves[block.leaf], block.number, window.cut(data, block))
                except CorruptGenerationError as problem:
                    if refuse is None:
                        raise
                    refuse(block, problem)
            yield data


def proven_blocks(
    reader: GenerationReader,
    leaves: Sequence[StoredLeaf],
    *,
    window_bytes: int = _WINDOW_BYTES,
    refuse: Refuse | None = None,
) -> Generator[tuple[Block, memoryview]]:
    """Give the blocks of leaves, in the order in which they are read best.

    Not collective. Not thread-safe. Arguments and errors are those of `proven_windows`.

    Returns:
        Each block, whose ``leaf`` is an index into ``leaves``, and its bytes, good until
        the next is asked for.
    """
    windows = plan_reads(
        [leaf.extent for leaf in leaves],
        [file.name for file in reader.manifest.files],
        block_bytes=reader.manifest.block_bytes,
        window_bytes=window_bytes,
    )
    with closing(proven_windows(reader, leaves, windows, refuse)) as proven:
        for window, data in zip(windows, proven, strict=True):
            for block in window.blocks:
                yield block, window.cut(data, block)


def verify(reader: GenerationReader) -> None:
    """Prove every byte of a generation.

    Not collective.

    Raises:
        CorruptGenerationError: On the calling rank, for the first that is wrong.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    for _ in proven_blocks(reader, reader.manifest.leaves):
        pass
