# SPDX-License-Identifier: Apache-2.0
"""Copies states into the memory of the ranks that hold a copy."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import agree, agree_on_root, bcast_bytes
from mpi_ckpt.engine.contents import Contents, capture_only
from mpi_ckpt.engine.description import describe_copy
from mpi_ckpt.engine.stage import LateCopies, StagedStream, stage
from mpi_ckpt.errors import StageError
from mpi_ckpt.leaf import Form, Leaf, MemoryBuffer
from mpi_ckpt.memory import Held
from mpi_ckpt.state import LeafState, PartsState, State
from mpi_ckpt.storage.stream import fill_leaves, read_form, write_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.draft import SaveRequest
    from mpi_ckpt.engine.stage import Staged
    from mpi_ckpt.memory import Memory

__all__ = ["remember_request"]

_DOING = "remembering the states"


@without_collections
def remember_request(
    comm: Communicator, memory: Memory, request: SaveRequest, *, late: bool
) -> SaveRequest:
    """Copy what a save would write into the memory, on the ranks that hold a copy.

    Collective. Main thread only. Nothing is being written from the memory. A rank that is
    killed meanwhile leaves each of the others with a whole copy: the last or this one.

    Args:
        comm: The communicator.
        memory: Of the same kind on every rank.
        request: What a save takes, all of it.
        late: Whether root may leave leaves behind a gate to whoever carries the save out.

    Returns:
        The request; on ranks that hold a copy, over that.

    Raises:
        StageError: On every rank, if a state cannot be copied on any, or there is no
            memory to copy it to.
    """
    # All that ranks must meet for comes first: what is left is a copy, which none can
    # keep from its end.
    told = _tell(comm, memory, request.states)

    def keep() -> SaveRequest:
        if not comm.is_root and memory.holders == "root":
            return request
        memory.clear()
        staged = stage(memory.arena, list(_take_here(comm, request.states, told)))
        staged.late.when_copied(lambda: _hold(memory, request, staged))
        if staged.late and not (late and comm.is_root):
            staged.late.copy()
            staged = replace(staged, late=LateCopies())
        return replace(request, states=staged.states, staged=staged)

    return agree(comm, _DOING, keep, error=StageError)


def _is_roots(one: Contents | State) -> bool:
    """Tell whether only root knows what a save would write of a state."""
    state = _state_of(one)
    if not isinstance(state, LeafState) or isinstance(state, PartsState):
        return True
    return state.sync_mode == "none"


def _state_of(one: Contents | State) -> State:
    return one.state if isinstance(one, Contents) else one


def _tell(
    comm: Communicator, memory: Memory, states: Sequence[Contents | State]
) -> Mapping[str, bytes]:
    """Send what only root knows to all: state name -> bytes. Collective."""
    if comm.size == 1 or memory.holders == "root":
        return {}
    theirs = [one for one in states if _is_roots(one)]

    def encode() -> list[bytes]:
        return [_encode(one) for one in theirs]

    encoded = agree_on_root(comm, _DOING, encode, error=StageError)
    return {
        one.name: bcast_bytes(comm, encoded[number] if encoded else None, _DOING)
        for number, one in enumerate(theirs)
    }


def _encode(one: Contents | State) -> bytes:
    stream = io.BytesIO()
    if isinstance(one, Contents):
        write_leaves(stream, one.structure, one.leaves)
    else:
        one.save(stream)
    return stream.getvalue()


def _take_here(
    comm: Communicator, states: Sequence[Contents | State], told: Mapping[str, bytes]
) -> Iterator[Contents | State]:
    for one in states:
        state = _state_of(one)
        if comm.is_root and isinstance(one, Contents):
            yield one
        elif isinstance(state, LeafState) and state.name in told:
            yield _decode(state, told[state.name])
        elif isinstance(state, LeafState):
            # Taken anew: what a sync has put in place came after it had captured. Digests
            # that do not fit any more are of a state that nobody but root writes.
            (mine,) = capture_only([state])
            yield replace(mine, digests=one.digests if isinstance(one, Contents) else None)
        elif state.name in told:
            yield StagedStream(state.name, memoryview(told[state.name]))
        else:
            yield state


def _decode(state: LeafState, data: bytes) -> Contents:
    stream = io.BytesIO(data)
    structure, specs = read_form(stream)
    leaves = [Leaf(spec, MemoryBuffer.empty(spec.nbytes)) for spec in specs]
    fill_leaves(stream, specs, leaves)
    return Contents(state, structure, tuple(leaves), Form(specs))


def _hold(memory: Memory, request: SaveRequest, staged: Staged) -> None:
    text = json.dumps(describe_copy(request, staged.states)).encode()
    data = [leaf.buffer.read() for one in staged.states for leaf in _leaves_of(one)]
    memory.held = Held(request.step, text, data)


def _leaves_of(one: Contents | State) -> Sequence[Leaf]:
    if isinstance(one, Contents):
        return one.leaves
    assert isinstance(one, StagedStream)
    return [one.leaf()]
