# SPDX-License-Identifier: Apache-2.0
"""A private copy of what is to be saved, so that training can go on."""

from __future__ import annotations

import io
import mmap
from dataclasses import replace
from typing import TYPE_CHECKING

from mpi_ckpt.engine.contents import Contents
from mpi_ckpt.errors import StageError
from mpi_ckpt.leaf import Leaf, MemoryBuffer
from mpi_ckpt.state import State

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

__all__ = ["Arena", "stage"]

# Each leaf starts at a multiple of this: copies of cache lines, aligned elements.
_ALIGNMENT = 64


class Arena:
    """Host memory for one staged copy, kept from one save to the next.

    Not collective. Not thread-safe. Fresh memory costs ten times the copy into it (every
    first touch of a page), so it only grows, and is given back by `close`.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def take(self, nbytes: int) -> memoryview:
        """Return memory of at least that many bytes; what was taken before is lost.

        Raises:
            StageError: On the calling rank, if there is not so much memory.
        """
        if self._memory is None or len(self._memory) < nbytes:
            self.close()
            try:
                self._memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
            except OSError as error:
                raise StageError(
                    f"no memory to stage a save: {nbytes} bytes are needed ({error}); "
                    "Options(asynchronous=False) saves without a copy"
                ) from error
        return memoryview(self._memory)

    def close(self) -> None:
        """Give the memory back, as soon as nothing uses it. Callable twice."""
        self._memory = None


class StagedStream(State):
    """What a plain state wrote, kept in memory."""

    def __init__(self, name: str, data: memoryview) -> None:
        super().__init__(name)
        self._data = data

    def save(self, fileobj: BinaryIO) -> None:
        """Write it again. Not collective. Thread-safe."""
        fileobj.write(self._data)


def stage(arena: Arena, states: Sequence[Contents | State]) -> list[Contents | State]:
    """Copy states so that they may change while the copies are written.

    Not collective. Called on root. One copy of every leaf; plain states write themselves
    into memory.

    Args:
        arena: Holds the leaves; an earlier copy in it is lost.
        states: Contents of leaf states, and plain states, in saving order.

    Returns:
        The same, over private memory.

    Raises:
        StageError: On the calling rank, if memory is short or a state's save fails.
    """
    contents = [one for one in states if isinstance(one, Contents)]
    sizes = [_padded(leaf.spec.nbytes) for one in contents for leaf in one.leaves]
    memory = arena.take(sum(sizes))
    offset = 0
    staged: list[Contents | State] = []
    for one in states:
        if not isinstance(one, Contents):
            staged.append(_stage_stream(one))
            continue
        leaves = []
        for leaf in one.leaves:
            place = memory[offset : offset + leaf.spec.nbytes]
            leaf.buffer.copy_to(place)
            leaves.append(Leaf(leaf.spec, MemoryBuffer(place)))
            offset += _padded(leaf.spec.nbytes)
        staged.append(replace(one, leaves=tuple(leaves)))
    return staged


def _stage_stream(state: State) -> StagedStream:
    stream = io.BytesIO()
    try:
        state.save(stream)
    except Exception as error:
        raise StageError(f"save() of state {state.name!r}: {error!r}") from error
    return StagedStream(state.name, stream.getbuffer())


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
