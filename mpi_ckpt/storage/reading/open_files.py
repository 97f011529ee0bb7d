# SPDX-License-Identifier: Apache-2.0
"""Keeps files open that are read repeatedly, up to a limit.

A generation of many writers may have more files than a process may have open.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from mpi_ckpt.storage import filesystem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Processes are often limited to 1024 descriptors, and most of those are the program's.
_OPEN_MAX = 128


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file.

    Attributes:
        descriptor: Its descriptor.
        nbytes: Its size when it was opened.
    """

    descriptor: int
    nbytes: int


@dataclass(slots=True)
class _Kept:
    file: OpenFile
    closing: ExitStack
    users: int = 0


class OpenFiles:
    """Opens files by name and keeps them open up to a limit. Thread-safe.

    Args:
        directory: Their directory.
        most: Number of files to keep open; more only while more are in use.
    """

    def __init__(self, directory: Path, most: int = _OPEN_MAX) -> None:
        self._directory = directory
        self._most = most
        self._lock = Lock()
        # From least to most recently used.
        self._open: OrderedDict[tuple[str, bool], _Kept] = OrderedDict()
        self._refused: set[str] = set()

    @contextmanager
    def use(self, name: str, *, direct: bool = False) -> Iterator[OpenFile]:
        """Yield a file that stays open within the block. Not collective.

        Args:
            name: Name of the file.
            direct: Whether to bypass the page cache, if the file system supports that;
                reads must then be aligned.

        Raises:
            OSError: On the calling rank, if it cannot be opened.
            ValueError: On the calling rank, if it is no regular file.
        """
        with self._lock:
            kept = self._take(name, direct=direct)
            kept.users += 1
        try:
            yield kept.file
        finally:
            with self._lock:
                kept.users -= 1
                self._make_room()

    def close(self) -> None:
        """Close all files; none may be in use. Not collective. Callable twice."""
        with self._lock, ExitStack() as all_of_them:
            while self._open:
                _, kept = self._open.popitem()
                all_of_them.push(kept.closing)

    def _take(self, name: str, *, direct: bool) -> _Kept:
        if direct and name not in self._refused:
            try:
                return self._opened(name, direct=True)
            except (OSError, ValueError):
                # Refused by the file system; or another file has this name now, and the
                # open one still serves.
                self._refused.add(name)
        return self._opened(name, direct=False)

    def _opened(self, name: str, *, direct: bool) -> _Kept:
        key = (name, direct)
        if key not in self._open:
            with ExitStack() as stack:
                opened = filesystem.open_for_reading(self._directory / name, direct=direct)
                file = OpenFile(*stack.enter_context(opened))
                self._open[key] = _Kept(file, stack.pop_all())
        self._open.move_to_end(key)
        return self._open[key]

    def _make_room(self) -> None:
        idle = [key for key, kept in self._open.items() if not kept.users]
        for key in idle[: max(0, len(self._open) - self._most)]:
            self._open.pop(key).closing.close()
