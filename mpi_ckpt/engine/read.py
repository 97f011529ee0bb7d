# SPDX-License-Identifier: Apache-2.0
"""Brings one generation from root's files into the states of every rank."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import agree, bcast_buffers
from mpi_ckpt.engine.read_plan import Batch, Place, plan_reads
from mpi_ckpt.engine.targets import NoBuffer, Target
from mpi_ckpt.errors import RestoreError, StateMismatchError
from mpi_ckpt.leaf import Leaf, LeafSpec, MemoryBuffer, copy_bytes
from mpi_ckpt.state import LeafState, State
from mpi_ckpt.states.ranked import RankedState
from mpi_ckpt.storage.prefetch import Prefetcher, Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.read_plan import Span
    from mpi_ckpt.engine.readers import Readers
    from mpi_ckpt.storage.manifest import Extent, Manifest
    from mpi_ckpt.storage.reader import GenerationReader

__all__ = ["Incoming", "adopt", "describe", "match", "title_of", "transfer"]

_OVERWRITTEN = (
    "published generations are untouched, but states in memory may hold a mixture: do "
    "not train on them"
)


@dataclass(frozen=True, slots=True)
class Incoming:
    """A state that is about to be restored.

    Attributes:
        state: The program's state.
        structure: What was saved beside the leaves; None for a stream.
        leaves: Where the leaves go; for a stream, one leaf of bytes.
        places: Where they come from.
        missing: Names of leaves that only the program has.
        unexpected: Names of leaves that only the generation has.
    """

    state: State
    structure: Any
    leaves: tuple[Leaf, ...]
    places: tuple[Place, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def describe(manifest: Manifest) -> dict[str, Any]:
    """Return what ranks other than root need of a manifest, as JSON values.

    Not collective. Thread-safe.
    """
    numbers = {file.name: number for number, file in enumerate(manifest.files)}

    def place(extent: Extent) -> list[int]:
        return [numbers[extent.file], extent.offset, extent.nbytes]

    return {
        "generation": manifest.generation,
        "step": manifest.step,
        "size": manifest.size,
        "metrics": dict(manifest.metrics),
        "block_bytes": manifest.block_bytes,
        "states": {
            state.name: {"places": [place(state.stream)]}
            if state.stream is not None
            else {
                "places": [place(leaf.extent) for leaf in state.leaves],
                "structure": state.structure,
                "leaves": [
                    [leaf.spec.name, leaf.spec.dtype, leaf.spec.shape]
                    for leaf in state.leaves
                ],
            }
            for state in manifest.states
        },
    }


def title_of(description: dict[str, Any]) -> str:
    """Return what messages call a description's generation. Not collective. Thread-safe."""
    number: int = description["generation"]
    return f"generation {number}" if number else "the copy in memory"


def match(
    description: dict[str, Any], states: Sequence[State], *, strict: bool
) -> list[Incoming]:
    """Find a place for every byte before the first one moves.

    Not collective. Called on every rank.

    Args:
        description: Made by `describe` on root.
        states: The states to restore; all are in the description.
        strict: Whether a leaf that only one side has is a mismatch.

    Raises:
        StateMismatchError: On the calling rank, listing all mismatches of all states.
    """
    matched: list[Incoming] = []
    problems: list[str] = []
    for state in states:
        try:
            matched.append(_match_one(description["states"][state.name], state, strict))
        except StateMismatchError as error:
            problems += error.problems or [str(error)]
    if problems:
        raise StateMismatchError(
            f"{title_of(description)} does not fit the program, nothing "
            "was changed:\n  " + "\n  ".join(problems),
            generation=description["generation"],
            problems=problems,
        )
    return matched


def _match_one(saved: dict[str, Any], state: State, strict: bool) -> Incoming:
    places = tuple(Place(*place) for place in saved["places"])
    if isinstance(state, RankedState) and "parts" in saved:
        # Its parts are dealt out: what this rank gets is not known yet.
        state.check(saved["structure"], saved["parts"])
        return Incoming(state, saved["structure"], (), ())
    if "leaves" not in saved:
        if isinstance(state, LeafState):
            raise StateMismatchError(f"state {state.name!r} was saved as a stream")
        spec = LeafSpec("stream", "U8", (places[0].nbytes,))
        leaf = Leaf(spec, MemoryBuffer.empty(spec.nbytes))
        return Incoming(state, None, (leaf,), places)
    if not isinstance(state, LeafState):
        raise StateMismatchError(f"state {state.name!r} was saved as leaves")
    specs = [LeafSpec(name, dtype, tuple(shape)) for name, dtype, shape in saved["leaves"]]
    structure = saved["structure"]
    if strict:
        return Incoming(state, structure, tuple(state.prepare(structure, specs)), places)
    common = state.prepare_common(structure, specs)
    leaves = tuple(
        leaf or Leaf(spec, NoBuffer())
        for spec, leaf in zip(specs, common.leaves, strict=True)
    )
    return Incoming(state, structure, leaves, places, common.missing, common.unexpected)


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
                comm, "reading a generation", read, error=RestoreError, safe=_OVERWRITTEN
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


def adopt(comm: Communicator, incoming: Sequence[Incoming]) -> None:
    """Let the states take over what has arrived, in order.

    Collective. Main thread only.

    Raises:
        CheckpointError: On every rank, if a state's load fails on any.
    """

    def take_over() -> None:
        for one in incoming:
            if isinstance(one.state, LeafState):
                one.state.adopt(one.structure, one.leaves)
            else:
                one.state.load(io.BytesIO(one.leaves[0].buffer.read()))

    agree(comm, "loading the states", take_over, error=RestoreError, safe=_OVERWRITTEN)
