# SPDX-License-Identifier: Apache-2.0
"""Host memory: kept for use again, and copies of states a job goes back to."""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mpi_ckpt.errors import OptionsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Arena", "Memory", "MemoryCopy", "round_up"]


def round_up(nbytes: int, multiple: int) -> int:
    """Return the next multiple of a number at or above another."""
    return -(-nbytes // multiple) * multiple


class Arena:
    """Host memory that starts at a page, kept from one use to the next.

    Not collective. Not thread-safe. Fresh memory costs more than the copy into it (every
    first touch of a page), so it only grows, and is given back by `close`.

    Args:
        huge_pages: Whether to ask for them. On one machine they take a quarter of the
            time to touch first, on a virtual one whose host takes back what is free five
            times as long: for what may be needed at any time, not for what is kept.
    """

    def __init__(self, *, huge_pages: bool = False) -> None:
        self._huge_pages = huge_pages
        self._memory: mmap.mmap | None = None

    @property
    def nbytes(self) -> int:
        """How much memory it holds, in bytes."""
        return 0 if self._memory is None else len(self._memory)

    def take(self, nbytes: int) -> memoryview:
        """Return memory of at least that many bytes; what was taken before is lost.

        Raises:
            OSError: On the calling rank, if there is not so much memory.
        """
        if self.nbytes < max(nbytes, 1):
            self.close()
            self._memory = self._map(max(nbytes, mmap.PAGESIZE))
        assert self._memory is not None
        return memoryview(self._memory)

    def close(self) -> None:
        """Give the memory back, as soon as nothing uses it. Callable twice."""
        self._memory = None

    def _map(self, nbytes: int) -> mmap.mmap:
        # Private: shared memory takes 1.5 times as long to touch first.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # as far as this kernel knows of them
            # A worker that the program forks would have a copy made of each page that is
            # written to from then on.
            memory.madvise(mmap.MADV_DONTFORK)
            if self._huge_pages:
                memory.madvise(mmap.MADV_HUGEPAGE)
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
