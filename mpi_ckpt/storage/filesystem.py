# SPDX-License-Identifier: Apache-2.0
"""Creates, writes, links, renames, fsyncs and deletes files; no other module does.

INVARIANT: nothing else in the package changes a file system, except the lock file, which
holds no data but the name of the owner. Every change goes through this module's ``os``, so
crash tests replace it by a recorder and replay every prefix of a save's changes.

Files are opened by path, and a link in its last part is never followed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "NO_DIRECTORY_SYNC",
    "append",
    "count_names",
    "create_file",
    "leave_direct",
    *("link_file", "list_names", "make_directories", "make_directory", "map_new_file"),
    "open_for_reading",
    "overwrite_start",
    "read_at",
    "read_start",
    "remove_file",
    "remove_tree",
    "rename_new",
    "replace_file",
    "reserve",
    "rewrite_file",
    "set_length",
    "start_writeback",
    "sync_directory",
    "sync_file",
    "write_all",
]

NO_DIRECTORY_SYNC = (
    *(errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR),
)
"""What fsync of an open directory says where the file system has no such operation."""

# One system call writes at most this much: Linux stops at 2 GiB - 4 KiB anyway.
_CALL_BYTES = 1 << 30
REMOVERS = 16
_PIECE_BYTES = 1 << 20


def make_directory(path: Path) -> None:
    """Make one directory that must not exist yet. Not collective."""
    os.mkdir(path, 0o777)


def make_directories(path: Path) -> None:
    """Make a directory and its parents, all durable, with the first existing parent.

    Not collective.
    """
    missing: list[Path] = []
    probe = path
    while not probe.exists():
        missing.append(probe)
        probe = probe.parent
    # CRASH: a job killed between mkdir and fsync leaves a name that may vanish.
    with suppress(PermissionError):  # this job did not make an unreadable directory
        sync_directory(probe.parent, if_possible=True)
    for directory in reversed(missing):
        with suppress(FileExistsError):  # another job may be first, which is as good
            os.mkdir(directory, 0o777)
        # CRASH: without this the directory may vanish with all its contents.
        sync_directory(directory.parent, if_possible=True)


@contextmanager
def create_file(path: Path, *, direct: bool = False) -> Iterator[int]:
    """Create a file that must not exist; yield its descriptor and close it afterwards.

    Not collective.

    Args:
        path: The file.
        direct: Whether writes bypass the page cache; they must then be aligned.

    Raises:
        OSError: On the calling rank; EINVAL, with nothing created, if the file system does
            not support direct writes.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if direct:
        flags |= os.O_DIRECT
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def map_new_file(path: Path, nbytes: int) -> mmap.mmap:
    """Make a file that must not exist, of so many bytes; return its bytes, writable.

    Not collective. For file systems in memory: what is written there is not recorded by
    crash tests, since nothing of it outlives a power cut.

    Raises:
        OSError: On the calling rank, if there is not enough space, with no file left.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        # Otherwise the first write to a page that does not fit would end the process.
        os.posix_fallocate(descriptor, 0, nbytes)
        memory = mmap.mmap(descriptor, nbytes)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    with suppress(AttributeError, OSError):  # if this kernel supports it
        memory.madvise(mmap.MADV_DONTFORK)
    return memory


def count_names(path: Path) -> int:
    """Return how many names a file has. Not collective."""
    return os.lstat(path).st_nlink


def leave_direct(descriptor: int) -> None:
    """Let a direct descriptor use the page cache from now on. Not collective."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Write all bytes at an offset. Not collective. Thread-safe for separate ranges."""
    view = memoryview(data).cast("B")
    while len(view) > 0:
        written = os.pwrite(descriptor, view[:_CALL_BYTES], offset)
        if written == 0:  # no file system should do this; a loop would hang the job
            raise OSError(errno.EIO, "the file system takes no more bytes")
        view = view[written:]
        offset += written


def reserve(descriptor: int, nbytes: int) -> bool:
    """Reserve space on disk before direct writes, if the file system can.

    Not collective. It makes direct writes on ext4 10 % faster, and finds a full disk or
    quota before anything is written.

    Returns:
        False if the file system cannot reserve.

    Raises:
        OSError: On the calling rank, if there is not enough space.
    """
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        # If the call is unknown, the C library writes single bytes instead, which a direct
        # descriptor refuses: nothing was done, and nothing needs to be undone.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True


def rewrite_file(path: Path, data: bytes) -> None:
    """Overwrite the start of a file that must exist, durably. Not collective."""
    with _open_for_writing(path) as descriptor:
        write_all(descriptor, data, 0)
        sync_file(descriptor)


def set_length(descriptor: int, nbytes: int) -> None:
    """Cut a file to its length. Not collective."""
    os.ftruncate(descriptor, nbytes)


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to write out a range soon, and to free its pages.

    Not collective. A hint: it leaves little work for the fsync at the end.
    """
    with suppress(OSError):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def sync_file(descriptor: int) -> None:
    """Make a file's bytes durable. Not collective.

    A failure is final: the kernel marks pages clean after a failed fsync, so a second
    call would succeed without the bytes (Rebello et al., USENIX ATC 2020). The caller
    must drop the file.
    """
    os.fsync(descriptor)


def sync_directory(path: Path, *, if_possible: bool = False) -> None:
    """Make the names in a directory durable.

    Not collective.

    Args:
        path: The directory.
        if_possible: Whether to ignore that a file system cannot fsync any directory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (if_possible and error.errno in NO_DIRECTORY_SYNC):
            raise
    finally:
        os.close(descriptor)


def rename_new(source: Path, target: Path) -> None:
    """Rename a directory to a name that must be free. Not collective.

    The caller holds the lock of the parent: no other job can take the name in between. A
    generation is never empty, so the rename itself fails if the target is one.
    """
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def replace_file(source: Path, target: Path) -> None:
    """Rename a file over another one in its directory. Not collective."""
    os.rename(source, target)


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name. Not collective.

    Raises OSError; EOPNOTSUPP, with no file left, if the file system copies instead.
    """
    try:
        os.link(source, target, follow_symlinks=False)
        if not os.path.samestat(os.lstat(source), os.lstat(target)):
            raise OSError(errno.EOPNOTSUPP, "links are no second names here", str(target))
    except FileExistsError:
        raise
    except OSError:
        # Some file systems fail but still make a link, which would block a copy.
        with suppress(OSError):
            os.unlink(target)
        raise


def append(path: Path, data: bytes) -> None:
    """Append to a file, made if missing; does not make it durable. Not collective."""
    with _open_for_writing(path, os.O_CREAT | os.O_APPEND) as descriptor:
        os.write(descriptor, data)


def overwrite_start(path: Path, data: bytes) -> None:
    """Overwrite the start of a file, made if missing; not durable. Not collective."""
    with _open_for_writing(path, os.O_CREAT) as descriptor:
        write_all(descriptor, data, 0)


@contextmanager
def _open_for_writing(path: Path, more_flags: int = 0) -> Iterator[int]:
    # A FIFO in its place is refused: otherwise the open would wait for a reader.
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | more_flags
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Delete a directory of files, at most one level deep. Not collective.

    Links are deleted, never followed. Missing files are no error.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        children = [path / entry for entry in list_names(path)]
        few = len(children) <= 4 * REMOVERS  # not those of many ranks
        with nullcontext() if few else ThreadPoolExecutor(REMOVERS) as pool:
            list((pool.map if pool else map)(_remove_child, children))
        os.rmdir(path)


def _remove_child(path: Path) -> None:
    try:
        remove_file(path)
    except IsADirectoryError:
        os.rmdir(path)


def remove_file(path: Path) -> None:
    """Delete a file; a missing file is no error. Not collective."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def list_names(path: Path) -> list[str]:
    """Return the sorted names in a directory. Not collective."""
    return sorted(os.listdir(path))


@contextmanager
def open_for_reading(path: Path, *, direct: bool = False) -> Iterator[tuple[int, int]]:
    """Open a regular file; yield its descriptor and size, and close it afterwards.

    Not collective. A FIFO or device is refused and does not block.

    Args:
        path: The file.
        direct: Whether reads bypass the page cache; they must then be aligned.

    Raises:
        OSError: On the calling rank, if it cannot be opened.
        ValueError: On the calling rank, if it is no regular file.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if direct:
        flags |= os.O_DIRECT
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        yield descriptor, status.st_size
    finally:
        with suppress(OSError):  # the bytes are proven: a failed close is harmless
            os.close(descriptor)


def read_start(path: Path, most: int) -> bytes:
    """Return the first bytes of a regular file.

    Not collective.

    Args:
        path: The file.
        most: How many; fewer only if the file is shorter.

    Raises:
        OSError: On the calling rank, if it cannot be read.
        ValueError: On the calling rank, if it is no regular file.
    """
    data = bytearray()
    piece = memoryview(bytearray(min(most, _PIECE_BYTES)))
    with open_for_reading(path) as (descriptor, _):
        # Not by its size, which is 0 for files that the kernel generates on reading.
        while count := read_at(descriptor, piece[: most - len(data)], len(data)):
            data += piece[:count]
    return bytes(data)


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill a buffer from an offset; return the count, less than its size only at the end.

    Not collective. Thread-safe.
    """
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done : done + _CALL_BYTES]], offset + done)
        if count == 0:
            break
        done += count
    return done
