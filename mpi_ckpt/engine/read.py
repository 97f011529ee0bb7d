# SPDX-License-Identifier: Apache-2.0
"""Brings the bytes of one generation from the files to where they belong on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.comm import agree, bcast_buffers
from mpi_ckpt.engine.incoming import OVERWRITTEN
from mpi_ckpt.engine.read_plan import Batch, plan_reads
from mpi_ckpt.engine.targets import Target
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.leaf import copy_bytes
from mpi_ckpt.storage.prefetch import Prefetcher, Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.incoming import Incoming
    from mpi_ckpt.engine.read_plan import Span
    from mpi_ckpt.engine.readers import Readers
    from mpi_ckpt.storage.reader import GenerationReader

__all__ = ["transfer"]


def transfer(
    comm: Communicator,
    readers: Readers,
    incoming: Sequence[Incoming],
    *,
    block_bytes: int,
    window_bytes: int,
) -> None:
    """Read, prove, broadcast, put in place: a window at a time, the readers in turn.

    Collective. Main thread only. No byte is sent or put in place before its block was
    proven. Files are read once, whatever the number of ranks, each window while the one
    before it is proven and sent.

    Args:
        comm: The communicator.
        readers: The ranks that read.
        incoming: What `match` found, in the same order on every rank.
        block_bytes: Block length of the generation.
        window_bytes: Memory a rank reads into, in two halves; at least two blocks.

    Raises:
        CorruptGenerationError: On every rank, if bytes are not those that were saved.
        ReadError: On every rank, if one that reads cannot.
    """
    leaves = [leaf for one in incoming for leaf in one.leaves]
    targets = [Target(leaf.buffer, leaf.spec.nbytes) for leaf in leaves]
    places = [place for one in incoming for place in one.places]
    batches = plan_reads(places, block_bytes=block_bytes, window_bytes=window_bytes // 2)

    turns = [readers.ranks[turn % len(readers.ranks)] for turn in range(len(batches))]

    def open_source() -> _Source | None:
        if readers.mine is None:
            return None
        mine = [one for one, rank in zip(batches, turns, strict=True) if rank == comm.rank]
        return _Source(readers.mine, incoming, mine)

    source = agree(comm, "preparing to read", open_source, error=RestoreError)
    try:
        for batch, turn in zip(batches, turns, strict=True):

            def read(batch: Batch = batch, turn: int = turn) -> memoryview | None:
                return source.take(batch) if source and turn == comm.rank else None

            window = agree(
                comm, "reading a generation", read, error=RestoreError, safe=OVERWRITTEN
            )
            _distribute(comm, batch, window, targets, turn)
    finally:
        if source is not None:
            source.close()


class _Source:
    """The proven bytes of a generation, on a rank that reads."""

    def __init__(
        self,
        reader: GenerationReader,
        incoming: Sequence[Incoming],
        batches: Sequence[Batch],
    ) -> None:
        self._reader = reader
        saved = [reader.manifest.state(one.state.name) for one in incoming]
        self._extents = [extent for one in saved if one for extent in one.extents]
        names = [file.name for file in reader.manifest.files]
        runs = [Run(names[batch.file], batch.start, batch.end) for batch in batches]
        self._prefetcher = Prefetcher(reader, runs)

    def close(self) -> None:
        """Stop reading ahead. Callable twice."""
        self._prefetcher.close()

    def take(self, batch: Batch) -> memoryview:
        """Return the bytes of the next batch, those of its pieces proven."""
        window = self._prefetcher.take()
        for leaf, block, start, end, offset, _ in batch.pieces:
            at = offset - batch.start
            part = window[at : at + end - start]
            self._reader.prove(self._extents[leaf], block, part)
        return window


def _distribute(
    comm: Communicator,
    batch: Batch,
    window: memoryview | None,
    targets: Sequence[Target],
    source: int,
) -> None:
    """Send the pieces of a batch from who read it to where they belong on every rank."""
    spans = batch.spans()
    if window is None:
        buffers = [_room(span, targets) for span in spans]
    else:
        buffers = [window[s.start - batch.start : s.end - batch.start] for s in spans]
    bcast_buffers(comm, buffers, "sending a generation", source)
    for span, buffer in zip(spans, buffers, strict=True):
        if window is not None or len(span.pieces) > 1:
            _place(span, buffer, targets)
    for piece in batch.pieces:
        if piece.last:
            targets[piece.leaf].finish()


def _room(span: Span, targets: Sequence[Target]) -> memoryview:
    """Return memory for a span to arrive in: where it belongs, if it is one piece."""
    if len(span.pieces) > 1:
        return memoryview(bytearray(span.end - span.start))
    (piece,) = span.pieces
    return targets[piece.leaf].memory()[piece.start : piece.end]


def _place(span: Span, data: memoryview, targets: Sequence[Target]) -> None:
    for leaf, _, start, end, offset, _ in span.pieces:
        at = offset - span.start
        copy_bytes(data[at : at + end - start], targets[leaf].memory()[start:end])
