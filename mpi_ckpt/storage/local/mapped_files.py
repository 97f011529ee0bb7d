# SPDX-License-Identifier: Apache-2.0
"""Keeps the files of a file system in memory for the next save, mapped.

Fresh pages of a tmpfs cost several times what the copy into them does. So each file has a
second name here, and its memory outlives the generation that had it: a save copies into the
memory of files that no generation has any more, and gives them to its own by hard link.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.storage import filesystem

if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence
    from pathlib import Path

_SPARE = ".spare-"


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A file whose bytes are this memory.

    Attributes:
        path: Its name among the spare files.
        memory: Its bytes.
    """

    path: Path
    memory: mmap.mmap

    @property
    def is_free(self) -> bool:
        """Whether no generation has it. Not collective."""
        with suppress(OSError):
            return filesystem.count_names(self.path) == 1
        return False


class MappedFiles:
    """The files of one host that are mapped. Not collective. Not thread-safe.

    Args:
        directory: Where they have their second names.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[MappedFile] = []
        self._made = 0

    def sweep(self) -> None:
        """Remove the second names that a job which was killed has left. Not collective."""
        mine = {one.path.name for one in self._files}
        with suppress(OSError):
            for name in filesystem.list_names(self._directory):
                if name.startswith(_SPARE) and name not in mine:
                    filesystem.remove_file(self._directory / name)

    def missing(self, sizes: Sequence[int]) -> int:
        """Return how many bytes `take` would have to make. Not collective."""
        free = [len(one.memory) for one in self._files if one.is_free]
        nbytes = 0
        for size in sizes:
            if size in free:
                free.remove(size)
            else:
                nbytes += size
        return nbytes

    def take(self, sizes: Sequence[int]) -> list[MappedFile]:
        """Return files of these sizes that no generation has; remove other such files.

        What an earlier call returned and no generation got is free again.

        Raises:
            OSError: On the calling rank, if there is not enough memory.
        """
        free = [one for one in self._files if one.is_free]
        found: list[MappedFile | None] = []
        for size in sizes:
            fit = next((one for one in free if len(one.memory) == size), None)
            if fit is not None:
                free.remove(fit)
            found.append(fit)
        self._remove(free)
        return [
            self._make(size) if one is None else one
            for size, one in zip(sizes, found, strict=True)
        ]

    def close(self) -> None:
        """Remove the second names, and with them files that no generation has."""
        self._remove(list(self._files))

    def _make(self, nbytes: int) -> MappedFile:
        self._made += 1
        path = self._directory / f"{_SPARE}{self._made}"
        made = MappedFile(path, filesystem.map_new_file(path, nbytes))
        self._files.append(made)
        return made

    def _remove(self, files: Sequence[MappedFile]) -> None:
        for one in files:
            self._files.remove(one)
            with suppress(OSError):
                filesystem.remove_file(one.path)
