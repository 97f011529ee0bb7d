# SPDX-License-Identifier: Apache-2.0
"""Keeps a generation's files open, and reads and proves runs of their bytes."""

from __future__ import annotations

import errno
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from mpi_ckpt.errors import CorruptGenerationError, ReadError
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.format.tile_table import TABLE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import TracebackType

    from mpi_ckpt.storage.format.manifest import StoredFile


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


# Errors of open that mean a damaged generation, rather than an unreachable one.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO)

Reader = TypeVar("Reader", bound="FileReader")


class FileReader:
    """Reads files of a generation; a context manager.

    Not collective. Several threads can read. Files are opened when first read and stay
    open, unless there are very many.

    Args:
        path: Directory of the generation.
        generation: Its number, for errors.
    """

    def __init__(self, path: Path, generation: int) -> None:
        self.path = path
        self._generation = generation
        # Threads append; concurrent additions to a number would lose some.
        self._counts: list[int] = []
        self._files = OpenFiles(path)

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return sum(self._counts)

    def close(self) -> None:
        """Close the files. Callable twice."""
        self._files.close()

    def __enter__(self: Reader) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read_direct(self, file: str, into: memoryview, offset: int) -> int:
        """Read directly, bypassing the page cache if possible, else through it.

        Not collective. Thread-safe.

        Args:
            file: Name of a file.
            into: Buffer aligned to 4096 bytes, its length a multiple of that.
            offset: A multiple of 4096.

        Returns:
            Bytes read; fewer than requested only at the end of the file.

        Raises:
            ReadError: On the calling rank, if the operating system cannot read them.
        """
        with self._reading(file):
            try:
                with self._files.use(file, direct=True) as found:
                    count = filesystem.read_at(found.descriptor, into, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Opened for direct reads, but a read fails: the file system needs another
                # alignment, or (Lustre) alignment of the read at the end too.
                with self._files.use(file) as found:
                    count = filesystem.read_at(found.descriptor, into, offset)
        self._counts.append(count)
        return count

    def read_header(self, file: StoredFile, most: int | None = None) -> bytes:
        """Return the proven header of a file. Not collective. Thread-safe.

        Args:
            file: The file.
            most: Bytes of the largest header that is none of a damaged manifest; None for
                that of a file of tiles.

        Raises:
            CorruptGenerationError: On the calling rank, if the file is missing, of another
                size, or has a damaged header.
            ReadError: On the calling rank, if the operating system cannot read it.
        """
        with self._reading(file.name):
            if file.header_bytes > (TABLE_BYTES_MAX if most is None else most):
                raise ValueError(f"{file.header_bytes} bytes are no header")
            header = bytearray(file.header_bytes)
            with self._files.use(file.name) as found, memoryview(header) as into:
                require_size(file, found.nbytes)
                self._counts.append(filesystem.read_at(found.descriptor, into, 0))
            prove_header(file, header)
        return bytes(header)

    def expect(self, file: str, found: int, needed: int) -> None:
        """Require that a read returned as many bytes as needed. Not collective.

        Raises:
            CorruptGenerationError: On the calling rank, if the file ends too early.
        """
        if found < needed:
            raise CorruptGenerationError(
                f"{self.path / file} ends at {found}, bytes up to {needed} are listed",
                path=self.path / file,
                generation=self._generation,
            )

    def prove_bytes(
        self, file: str, offset: int, data: memoryview, expected: bytes
    ) -> None:
        """Compare the bytes of a block with their saved digest.

        Not collective. Thread-safe.

        Args:
            file: Name of the file.
            offset: Place of the bytes in the file.
            data: The bytes read.
            expected: Their saved digest.

        Raises:
            CorruptGenerationError: On the calling rank, if they differ.
        """
        found = digest_bytes(data)
        if found != expected:
            where = self.path / file
            raise CorruptGenerationError(
                f"{where}: bytes {offset} to {offset + len(data)} have digest "
                f"{found.hex()}, expected {expected.hex()}",
                path=where,
                generation=self._generation,
            )

    def _reading(self, name: str) -> AbstractContextManager[None]:
        return corrupt_unless_readable(self.path / name, self._generation)


def require_size(file: StoredFile, nbytes: int) -> None:
    """Require the listed size of a file. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if it has another.
    """
    if nbytes != file.nbytes:
        raise ValueError(f"has {nbytes} bytes, expected {file.nbytes}")


def prove_header(file: StoredFile, header: bytes | bytearray) -> None:
    """Require the header of a file to be the saved one. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if it is not.
    """
    if digest_bytes(header) != file.header_digest:
        raise ValueError("its header does not match its digest")


@contextmanager
def corrupt_unless_readable(where: Path, generation: int | None) -> Iterator[None]:
    """Raise errors of files that are not there, or wrong, as those of a damaged generation.

    Not collective.

    Raises:
        CorruptGenerationError: On the calling rank, for a missing file or a ValueError.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    try:
        with os_errors_as(ReadError, "reading", where):
            yield
    except ReadError as error:
        if error.errno not in _NOT_THERE or _is_listed(where, error.errno):
            raise
        raise CorruptGenerationError(
            f"{error}", path=where, generation=generation
        ) from error
    except ValueError as error:
        raise CorruptGenerationError(
            f"{where}: {error}", path=where, generation=generation
        ) from error


def _is_listed(where: Path, code: int) -> bool:
    """Return whether a listing shows a file that open did not find: it may exist."""
    if code != errno.ENOENT:
        return False
    try:
        return where.name in filesystem.list_names(where.parent)
    except OSError:
        return where.parent.is_dir()  # it exists, but cannot be listed
