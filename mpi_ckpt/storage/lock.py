# SPDX-License-Identifier: Apache-2.0
"""One job owns a checkpoint directory: an flock, held by root while the job lives.

A lock can be lost without its holder's knowing: a node is cut off, the file server gives
the lock to a successor, and the old job lives on. So the file also names its owner. The
last to sign it is the owner; whoever finds another name there is fenced off.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from mpi_ckpt.errors import FencedError, LockedError, SaveError
from mpi_ckpt.storage.faults import in_words, os_errors_as
from mpi_ckpt.storage.layout import LOCK

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DirectoryLock"]

PATIENCE_SECONDS = 5.0
"""A job that was just killed may take this long to die and let go."""


class DirectoryLock:
    """Exclusive ownership of a checkpoint directory.

    Root only. Not thread-safe. The kernel lets go when the process dies, so a dead job
    never blocks its successor.

    Args:
        root: The checkpoint directory; must exist.
        job: Name of this job, told to whoever is refused.
        patience_seconds: How long to wait for another owner to end.

    Raises:
        LockedError: On the calling rank, if another job holds the directory.
        SaveError: On the calling rank, if the lock file cannot be used.
    """

    def __init__(
        self, root: Path, job: str, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._path = root / LOCK
        where = f"process {os.getpid()} on {socket.gethostname()}"
        self._signature = f"job {job}, {where}\n".encode()
        self._signed = False
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os_errors_as(SaveError, "opening the lock", self._path):
            self._descriptor = os.open(self._path, flags, 0o666)
        try:
            self._require_file()
            self._acquire(patience_seconds)
        except BaseException:
            os.close(self._descriptor)
            raise
        with suppress(SaveError):  # a full disk must not keep us from owning it
            self.sign()
        _HELD.add(self)

    def _require_file(self) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise SaveError(
                f"{self._path} is no regular file: somebody has put it there; remove it",
                path=self._path,
            )

    def sign(self) -> bool:
        """Name this job as the owner, unless that is done.

        From then on nobody who owned the directory before passes `check`.

        Returns:
            Whether it was done now: leftovers of others must then be swept.

        Raises:
            SaveError: On the calling rank, if the file cannot be written.
        """
        if self._signed:
            return False
        with os_errors_as(SaveError, "signing the lock", self._path):
            if os.fstat(self._descriptor).st_nlink > 1:
                raise SaveError(
                    f"{self._path} has a second name, which may be that of a file of "
                    "somebody's: it is not written to; remove it",
                    path=self._path,
                )
            # In place: that takes no room on a full disk.
            if os.pwrite(self._descriptor, self._signature, 0) < len(self._signature):
                # Half a name is nobody's, and would shut this job out as a stranger.
                raise OSError(errno.EIO, "the file system takes no more bytes")
            os.ftruncate(self._descriptor, len(self._signature))
            # Also what shows it to other hosts: a network file system may hold it back.
            os.fsync(self._descriptor)
        self._signed = True
        return True

    def check(self) -> None:
        """Require that this job is still the one named in the file.

        The file is opened anew, by name: that is when network file systems look whether
        it has changed, and when a replaced one is found. What is cached of it is dropped.

        Raises:
            FencedError: On the calling rank, if another job has signed it, or it is gone.
            SaveError: On the calling rank, if it cannot be read.
        """
        with os_errors_as(SaveError, "reading the lock", self._path):
            found = self._read()
        if found != self._signature:
            now = found.decode(errors="replace").strip() or "nobody: no lock file"
            raise FencedError(
                f"{self._path.parent} has been taken over from this job; it now belongs "
                f"to {now}. This job was cut off from the directory, or its lock file "
                "was removed; it may not save here any more: end it",
                path=self._path,
            )

    def _read(self) -> bytes:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self._path, flags)
        except FileNotFoundError:
            return b""
        try:
            # Linux's NFS client keeps the bytes it has of a file that it has open for
            # writing, as ours is to be locked, whatever others have written since.
            with suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return os.pread(descriptor, 500, 0)
        finally:
            os.close(descriptor)

    def _acquire(self, patience_seconds: float) -> None:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise LockedError(
                        f"{self._path.parent} belongs to another running job "
                        f"({self._owner()}); two jobs would overwrite each other's "
                        "checkpoints: end that job, or give this one a directory of "
                        "its own",
                        path=self._path,
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                raise SaveError(
                    f"{self._path} cannot be locked: {in_words(error)}; the file system "
                    "must support flock",
                    path=self._path,
                    errno=error.errno,
                ) from error
            else:
                return

    def _owner(self) -> str:
        with suppress(OSError):
            return os.pread(self._descriptor, 500, 0).decode(errors="replace").strip()
        return "owner unknown"

    def close(self) -> None:
        """Let go of the directory; in a forked child, only forget it. Callable twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_HELD: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked data-loader worker shares the open file: without this it would hold the
    # lock beyond the death of the process that took it.
    for lock in list(_HELD):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)
