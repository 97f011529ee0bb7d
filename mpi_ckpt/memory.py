# SPDX-License-Identifier: Apache-2.0
"""Copies of states in host memory: what a job goes back to without reading a file."""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mpi_ckpt.errors import OptionsError, StageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Arena", "Memory", "MemoryCopy"]


class Arena:
    """Host memory for one copy of states, kept from one copy to the next.

    Not collective. Not thread-safe. Fresh memory costs more than the copy into it (every
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
                self._memory = _map(max(nbytes, mmap.PAGESIZE))
            except OSError as error:
                raise StageError(
                    f"no memory to stage a save: {nbytes} bytes are needed ({error}); "
                    "Options(asynchronous=False) saves without a copy"
                ) from error
        return memoryview(self._memory)

    def close(self) -> None:
        """Give the memory back, as soon as nothing uses it. Callable twice."""
        self._memory = None


def _map(nbytes: int) -> mmap.mmap:
    # Private: shared memory takes 1.5 times as long to touch first. Not of huge pages: on a
    # virtual machine whose host takes back what is free they took 5 times as long.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A worker that the program forks would have a copy made of each page that is written
    # to from then on.
    with suppress(AttributeError, OSError):  # as far as this kernel knows of it
        memory.madvise(mmap.MADV_DONTFORK)
    return memory


@dataclass(frozen=True, slots=True)
class MemoryCopy:
    """A complete copy of all states.

    Attributes:
        step: The training step it was made at.
        text: What it holds, as JSON: the same for copies of equal form.
        leaves: The bytes of the leaves of each state, by its name.
    """

    step: int
    text: bytes
    leaves: Mapping[str, Sequence[memoryview]]


class Memory:
    """The last copy of a manager's states on this rank; outlives the manager.

    Given to a `CheckpointManager`, it is filled by each save, by ``remember()``, and by
    ``step()`` as often as told. A later manager, over any ranks, that is given it restores
    from it before it looks at files, as long as its root holds a copy. Main thread only.

    Args:
        holders: Which ranks hold a copy: ``"all"``, so that any rank may be lost, or
            ``"root"`` alone, which is enough to undo what was done since.
        every: After how many steps ``step()`` makes a copy; None for saves only.

    Raises:
        OptionsError: On every rank that makes it, if an argument cannot be used.
    """

    def __init__(
        self, holders: Literal["root", "all"] = "all", *, every: int | None = None
    ) -> None:
        if holders not in ("root", "all"):
            raise OptionsError(f"holders is {holders!r}: root or all")
        if every is not None and every < 1:
            raise OptionsError(f"every is {every}: at least 1 step, or None")
        self.holders = holders
        self.every = every
        self.arena = Arena()
        self.copy: MemoryCopy | None = None

    @property
    def step(self) -> int | None:
        """Step of the copy that this rank holds; None if it holds none.

        Not collective.
        """
        return None if self.copy is None else self.copy.step

    def is_due(self, step: int) -> bool:
        """Tell whether a copy is to be made after a step. Not collective."""
        return self.every is not None and step % self.every == 0

    def clear(self) -> None:
        """Forget the copy; its memory stays for the next. Not collective."""
        self.copy = None

    def describe(self) -> str:
        """Return what must be the same on every rank. Not collective."""
        return f"Memory({self.holders!r}, every={self.every})"
