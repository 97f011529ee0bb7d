# SPDX-License-Identifier: Apache-2.0
"""Copies the contents of a save to private memory, so that training can go on."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpi_ckpt.digest import Digest
from mpi_ckpt.engine.sync.captured import CapturedState, about_leaf
from mpi_ckpt.errors import StageError
from mpi_ckpt.leaf import Leaf, LeafSpec, MemoryBuffer
from mpi_ckpt.memory import round_up
from mpi_ckpt.state import State
from mpi_ckpt.storage.format.manifest import STREAM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import BinaryIO

    from mpi_ckpt.leaf import Gate
    from mpi_ckpt.memory import Arena

# Each leaf starts at a multiple of this, for whole cache lines and aligned elements.
_ALIGNMENT = 64


class StagedStream(State):
    """The stream of a plain state, kept in memory."""

    def __init__(self, name: str, data: memoryview) -> None:
        super().__init__(name)
        self._data = data

    @property
    def nbytes(self) -> int:
        """Size of the stream in bytes."""
        return self._data.nbytes

    def leaf(self) -> Leaf:
        """Return the stream as a leaf of bytes. Not collective. Thread-safe."""
        return Leaf(LeafSpec(STREAM, "U8", (self.nbytes,)), MemoryBuffer(self._data))

    def save(self, fileobj: BinaryIO) -> None:
        """Write the stream to a file. Not collective. Thread-safe."""
        fileobj.write(self._data)


@dataclass(frozen=True, slots=True)
class _LateCopy:
    leaf: Leaf
    place: memoryview
    stamp: int
    digest: Digest | None

    def is_spoilt(self) -> bool:
        """Return whether the copied bytes differ from those at the save."""
        if self.leaf.buffer.stamp() != self.stamp:
            return True
        # INVARIANT: no digest of other bytes than those written gets into a manifest.
        return self.digest is not None and Digest.of(self.place) != self.digest


class LateCopies:
    """Copies of leaves behind a gate, which are made in the background.

    Not collective. Filled on the main thread, made on another thread.
    """

    def __init__(self) -> None:
        self._copies: list[_LateCopy] = []
        self._copied: Callable[[], None] | None = None

    def __bool__(self) -> bool:
        return bool(self._copies)

    @property
    def gates(self) -> set[Gate]:
        """The gates that block changes until `copy` has ended."""
        return {copy.leaf.gate for copy in self._copies if copy.leaf.gate is not None}

    def add(self, leaf: Leaf, place: memoryview, digest: Digest | None) -> None:
        """Add a leaf, its destination, and its digest if already taken."""
        self._copies.append(_LateCopy(leaf, place, leaf.buffer.stamp(), digest))

    def when_copied(self, act: Callable[[], None]) -> None:
        """Call a function after `copy` succeeds; at once if there is nothing to copy."""
        if self._copies:
            self._copied = act
        else:
            act()

    def copy(self) -> None:
        """Make the added copies.

        Raises:
            StageError: On the calling rank, with the names of leaves that other code
                changed meanwhile without passing the gate.
        """
        for copy in self._copies:
            copy.leaf.buffer.copy_to(copy.place)
        changed = [copy.leaf.spec.name for copy in self._copies if copy.is_spoilt()]
        if changed:
            raise StageError(
                "changed while they were being copied, not by an optimizer's step(): "
                f"{', '.join(changed)}. Nothing of this save is kept; change them after "
                "step(), or save without overlap",
                problems=changed,
            )
        if self._copied is not None:
            self._copied()


@dataclass(frozen=True, slots=True)
class Staged:
    """Copies of states.

    Attributes:
        states: The same states, over private memory.
        late: Copies still to be made.
    """

    states: list[CapturedState | State]
    late: LateCopies


def stage(arena: Arena, states: Sequence[CapturedState | State]) -> Staged:
    """Copy states so that they may change while the copies are written.

    Not collective. Called on ranks that write. One copy of every leaf; plain states write
    themselves into memory. Leaves behind a gate are left for later.

    Args:
        arena: Holds the leaves; an earlier copy in it is lost.
        states: Captured leaf states, and plain states, in saving order.

    Returns:
        The copies. No code may pass the gates of the late ones before these are made.

    Raises:
        StageError: On the calling rank, if memory is short or a state's ``save`` fails.
    """
    captured = [state for state in states if isinstance(state, CapturedState)]
    sizes = [
        round_up(leaf.spec.nbytes, _ALIGNMENT)
        for content in captured
        for leaf in content.leaves
    ]
    memory = _take(arena, sum(sizes))
    offset = 0
    staged: list[CapturedState | State] = []
    late = LateCopies()
    for state in states:
        if not isinstance(state, CapturedState):
            staged.append(_stage_stream(state))
            continue
        leaves = []
        for number, leaf in enumerate(state.leaves):
            place = memory[offset : offset + leaf.spec.nbytes]
            if leaf.gate is None:
                try:
                    leaf.buffer.copy_to(place)
                except Exception:
                    with about_leaf(state, leaf):
                        raise
            else:
                late.add(leaf, place, state.digests[number] if state.digests else None)
            leaves.append(Leaf(leaf.spec, MemoryBuffer(place)))
            offset += round_up(leaf.spec.nbytes, _ALIGNMENT)
        staged.append(replace(state, leaves=tuple(leaves)))
    return Staged(staged, late)


def _stage_stream(state: State) -> StagedStream:
    stream = io.BytesIO()
    try:
        state.save(stream)
    except Exception as error:
        raise StageError(f"save() of state {state.name!r}: {error!r}") from error
    return StagedStream(state.name, stream.getbuffer())


def _take(arena: Arena, nbytes: int) -> memoryview:
    try:
        return arena.take(nbytes)
    except OSError as error:
        raise StageError(
            f"no memory to stage a save: {nbytes} bytes are needed ({error}); "
            "Options(asynchronous=False) saves without a copy"
        ) from error
