# SPDX-License-Identifier: Apache-2.0
"""Copies the states into the `Memory` of each rank that holds a copy."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import agree, bcast_bytes, on_root
from mpi_ckpt.engine.outline import Outline, StateOutline
from mpi_ckpt.engine.save.remembering import RememberedTiles, number_of
from mpi_ckpt.engine.save.staging import LateCopies, Staged, StagedStream, stage
from mpi_ckpt.engine.sync.captured import CapturedState, capture_states
from mpi_ckpt.errors import StageError
from mpi_ckpt.leaves.leaf import Form, Leaf, MemoryBuffer
from mpi_ckpt.memory import MemoryCopy
from mpi_ckpt.state import LeafState, PartsState, State
from mpi_ckpt.storage.format.tensorfile import fill_leaves, read_form, write_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.save.request import SaveRequest
    from mpi_ckpt.memory import Memory

_DOING = "remembering the states"
_NO_TILES = RememberedTiles()


@without_collections()
def copy_into(
    memory: Memory,
    comm: Communicator,
    request: SaveRequest,
    threads: int,
    *,
    late: bool,
    tiles: RememberedTiles = _NO_TILES,
) -> Staged | None:
    """Copy the contents of a save into the memory, on the ranks that hold a copy.

    Collective. Main thread only. No save is being written from the memory. If a rank is
    killed meanwhile, each other rank still has a whole copy: the previous one or this one.

    Args:
        memory: The memory, of the same kind on every rank.
        comm: The communicator.
        request: All contents of a save.
        threads: Threads that copy.
        late: Whether root may leave the copies of leaves behind a gate to the thread that
            writes the save.
        tiles: The copies of their tiles, which all ranks have made already.

    Returns:
        The copies, on ranks that hold one; None elsewhere.

    Raises:
        StageError: On every rank, if any rank cannot copy a state, or lacks the memory for
            it.
    """
    # All meetings of the ranks come first: only a copy follows, which no other rank can
    # block.
    from_root = _send_from_root(comm, memory, request.states)

    def keep() -> Staged | None:
        if not comm.is_root and memory.holders == "root":
            tiles.keep(memory)
            return None
        memory.copy = None
        taken = list(_take_here(comm, request.states, from_root))
        staged = stage(memory.arena, taken, threads=threads)
        staged.late.when_copied(lambda: _hold(memory, request, staged, tiles))
        if staged.late and not (late and comm.is_root):
            staged.late.copy()
            staged = replace(staged, late=LateCopies())
        return staged

    return agree(comm, _DOING, keep, error=StageError)


def _send_from_root(
    comm: Communicator, memory: Memory, states: Sequence[CapturedState | State]
) -> Mapping[str, bytes]:
    """Send all ranks what only root knows: state name -> bytes. Collective."""
    if comm.size == 1 or memory.holders == "root":
        return {}
    theirs = [content for content in states if _is_roots(content)]
    encoded: list[bytes] = []

    def encode() -> None:
        encoded.extend(_encode(content) for content in theirs)

    on_root(comm, _DOING, encode, error=StageError)
    return {
        content.name: bcast_bytes(comm, encoded[number] if encoded else None, _DOING)
        for number, content in enumerate(theirs)
    }


def _is_roots(content: CapturedState | State) -> bool:
    """Return whether only root knows the contents of a state that a save would write."""
    state = _state_of(content)
    if not isinstance(state, LeafState) or isinstance(state, PartsState):
        return True
    return state.sync_mode == "none"


def _state_of(content: CapturedState | State) -> State:
    return content.state if isinstance(content, CapturedState) else content


def _encode(content: CapturedState | State) -> bytes:
    stream = io.BytesIO()
    if isinstance(content, CapturedState):
        write_leaves(stream, content.structure, content.leaves)
    else:
        content.save(stream)
    return stream.getvalue()


def _take_here(
    comm: Communicator,
    states: Sequence[CapturedState | State],
    from_root: Mapping[str, bytes],
) -> Iterator[CapturedState | State]:
    for content in states:
        state = _state_of(content)
        if comm.is_root and isinstance(content, CapturedState):
            yield content
        elif isinstance(state, LeafState) and state.name in from_root:
            yield _decode(state, from_root[state.name])
        elif isinstance(state, LeafState):
            # Capture again: a sync stored bytes after it had captured. Digests that no
            # longer match belong to a state that only root writes.
            (mine,) = capture_states([state])
            known = content.digests if isinstance(content, CapturedState) else None
            yield replace(mine, digests=known)
        elif state.name in from_root:
            yield StagedStream(state.name, memoryview(from_root[state.name]))
        else:
            yield state


def _decode(state: LeafState, data: bytes) -> CapturedState:
    stream = io.BytesIO(data)
    structure, specs = read_form(stream)
    leaves = [Leaf(spec, MemoryBuffer.empty(spec.nbytes)) for spec in specs]
    fill_leaves(stream, specs, leaves)
    return CapturedState(state, structure, tuple(leaves), Form(specs))


def _hold(
    memory: Memory, request: SaveRequest, staged: Staged, tiles: RememberedTiles
) -> None:
    outline = Outline(
        step=request.step,
        size=request.size,
        metrics=dict(request.metrics),
        states=tuple(_outline_of(content, tiles) for content in staged.states),
        copy=tiles.name,
    )
    leaves = {
        content.name: [leaf.buffer.read() for leaf in _leaves_of(content)]
        for content in staged.states
    }
    text = json.dumps(outline.to_json()).encode()
    memory.copy = MemoryCopy(request.step, text, leaves, number_of(tiles.name))
    tiles.keep(memory)


def _outline_of(content: CapturedState | State, tiles: RememberedTiles) -> StateOutline:
    if not isinstance(content, CapturedState):
        return StateOutline.of_stream(content.name, _leaves_of(content)[0].spec.nbytes)
    known = tiles.states.get(content.name)
    if known is None:
        return StateOutline(content.name, content.structure, content.specs)
    # The structure of root, as in a file: those of other ranks may be others.
    return StateOutline(content.name, known.structure, content.specs, cut=known.cut)


def _leaves_of(content: CapturedState | State) -> Sequence[Leaf]:
    if isinstance(content, CapturedState):
        return content.leaves
    assert isinstance(content, StagedStream)
    return [content.leaf()]
