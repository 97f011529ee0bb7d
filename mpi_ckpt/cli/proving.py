# SPDX-License-Identifier: Apache-2.0
"""Proves every byte of a generation, around the page cache where that is possible.

What the cache holds says nothing of what the disk does, and a proof should.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from mpi_ckpt.engine.read_plan import Place, plan_reads
from mpi_ckpt.errors import CheckpointError, CorruptGenerationError
from mpi_ckpt.storage.prefetch import Prefetcher, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mpi_ckpt.storage.manifest import Extent
    from mpi_ckpt.storage.reader import GenerationReader

__all__ = ["find_problems", "labelled_extents", "proven_blocks"]

_WINDOW_BYTES = 32 << 20
_PROBLEMS_MAX = 1000


def labelled_extents(reader: GenerationReader) -> list[tuple[str, Extent]]:
    """Return all runs of bytes of a generation with names for people."""
    found = []
    for state in reader.manifest.states:
        if state.stream is not None:
            found.append((state.name, state.stream))
        found += [(f"{state.name}/{leaf.spec.name}", leaf.extent) for leaf in state.leaves]
    return found


def find_problems(
    reader: GenerationReader, done: Callable[[int], None]
) -> list[tuple[str, CheckpointError]]:
    """Read a whole generation and return what is wrong with it.

    Args:
        reader: The open generation.
        done: Told the bytes that were read.

    Returns:
        Name of the leaf and the error, for each block that is wrong, in reading order;
        it ends at a file that cannot be read to its end.
    """
    labelled = labelled_extents(reader)
    problems: list[tuple[str, CheckpointError]] = []
    extents = [extent for _, extent in labelled]
    try:
        for index, block, data in _blocks(reader, extents):
            done(len(data))
            try:
                reader.prove(extents[index], block, data)
            except CorruptGenerationError as error:
                problems.append((labelled[index][0], error))
            if len(problems) >= _PROBLEMS_MAX:
                break
    except CheckpointError as error:
        problems.append(("", error))
    return problems


def proven_blocks(
    reader: GenerationReader, extents: Sequence[Extent]
) -> Iterator[tuple[int, int, memoryview]]:
    """Give the bytes of some extents, in the order in which they are read best.

    Returns:
        Index of the extent, index of the block, and its bytes, good until the next.

    Raises:
        CorruptGenerationError: For the first block that is not what was saved.
        ReadError: If the operating system cannot read it.
    """
    for index, block, data in _blocks(reader, extents):
        reader.prove(extents[index], block, data)
        yield index, block, data


def _blocks(
    reader: GenerationReader, extents: Sequence[Extent]
) -> Iterator[tuple[int, int, memoryview]]:
    names = [file.name for file in reader.manifest.files]
    numbers = {name: number for number, name in enumerate(names)}
    batches = plan_reads(
        [Place(numbers[one.file], one.offset, one.nbytes) for one in extents],
        block_bytes=reader.manifest.block_bytes,
        window_bytes=_WINDOW_BYTES,
    )
    runs = [Run(names[batch.file], batch.start, batch.end) for batch in batches]
    with closing(Prefetcher(reader, runs)) as prefetcher:
        for batch in batches:
            window = prefetcher.take()
            for piece in batch.pieces:
                start = piece.offset - batch.start
                yield piece.leaf, piece.block, window[start : start + piece.nbytes]
