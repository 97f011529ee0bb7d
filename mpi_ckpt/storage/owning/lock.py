# SPDX-License-Identifier: Apache-2.0
"""Locks a checkpoint directory for one job: root holds an flock while the job lives.

If the file system has no flock, a lease shows whether a job is alive.

A holder can lose its lock without notice: a node is cut off, the file server gives the lock
to a successor, and the old job lives on. So the lock file also names its owner. The last
job to sign it is the owner; a job that finds another name there is fenced off.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from mpi_ckpt.errors import FencedError, LockedError, OptionsError, SaveError
from mpi_ckpt.storage.faults import in_words, os_errors_as
from mpi_ckpt.storage.format.layout import LOCK
from mpi_ckpt.storage.owning.lease import Lease, remove_other_leases, wait_for_end

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.options import Locking

PATIENCE_SECONDS = 5.0
"""A job that was just killed may take this long to die and let go."""

_PAUSES_SECONDS = (0.05, 0.2)

_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What flock says where the file system, or its mount, has no locks."""

_SETTLE_SECONDS = 1.0
"""Of two jobs that find a dead lease at one moment, both have signed after this long."""


class DirectoryLock:
    """Exclusive ownership of a checkpoint directory.

    Root only. Not thread-safe. The kernel releases the lock when the process dies, so a
    dead job never blocks its successor; a lease blocks it for one term.

    Args:
        root: The checkpoint directory; must exist.
        job: Name of this job, which a refused job reports.
        patience_seconds: How long to wait for another owner to end.
        locking: How to see that another job is alive: by its flock; by its lease, and its
            flock if there is one; by ``"either"``: its flock, or a lease if there is no
            flock; or not at all: then the last job to start is the owner.

    Raises:
        LockedError: On the calling rank, if another job holds the directory.
        OptionsError: On the calling rank, if the file system has no flock and ``locking``
            needs it.
        SaveError: On the calling rank, if the lock file cannot be used.
    """

    def __init__(
        self,
        root: Path,
        job: str,
        patience_seconds: float = PATIENCE_SECONDS,
        *,
        locking: Locking | Literal["either"] = "flock",
    ) -> None:
        self._root = root
        self._job = job
        self._path = root / LOCK
        self._lease: Lease | None = None
        where = f"process {os.getpid()} on {socket.gethostname()}"
        self._signature = f"job {job}, {where}\n".encode()
        self._signed = False
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os_errors_as(SaveError, "opening the lock", self._path):
            self._descriptor = os.open(self._path, flags, 0o666)
        try:
            self._require_file()
            is_locked = locking != "none" and self._acquire(patience_seconds, locking)
            if locking != "none":
                self._outlast_lease(patience_seconds)
            if locking == "lease" or (locking == "either" and not is_locked):
                # Before the signature, which names the lease that others must watch.
                self._lease = Lease(root, job)
            with suppress(SaveError):  # a full disk must not prevent ownership
                self.sign()
                if self._lease is not None and not is_locked:
                    self._settle()
        except BaseException:
            self.close()
            raise
        _HELD.add(self)

    def _require_file(self) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise SaveError(
                f"{self._path} is no regular file: somebody has put it there; remove it",
                path=self._path,
            )

    def sign(self) -> bool:
        """Write this job's name as the owner, unless it is there.

        From then on no earlier owner passes `check`.

        Returns:
            Whether it wrote the name now: leftovers of others must then be swept.

        Raises:
            SaveError: On the calling rank, if the file cannot be written.
        """
        if self._signed:
            return False
        with os_errors_as(SaveError, "signing the lock", self._path):
            if os.fstat(self._descriptor).st_nlink > 1:
                raise SaveError(
                    f"{self._path} has a second name, which somebody may use as another "
                    "file: nothing was written to it; remove this lock file",
                    path=self._path,
                )
            # In place: that needs no space on a full disk.
            if os.pwrite(self._descriptor, self._signature, 0) < len(self._signature):
                # Half a name belongs to no job, and would lock out this one too.
                raise OSError(errno.EIO, "the file system takes no more bytes")
            os.ftruncate(self._descriptor, len(self._signature))
            # This also shows the name to other hosts: a network file system may delay it.
            os.fsync(self._descriptor)
        self._signed = True
        remove_other_leases(self._root, self._job)
        return True

    def check(self) -> None:
        """Require that the file still names this job.

        The file is opened again by name: only then do network file systems check whether it
        has changed, and only that finds a replaced file. Its cached bytes are dropped.

        Raises:
            FencedError: On the calling rank, if another job has signed the file, or it is
                gone.
            SaveError: On the calling rank, if it cannot be read.
        """
        with os_errors_as(SaveError, "reading the lock", self._path):
            for pause in (*_PAUSES_SECONDS, None):
                found = _read_signature(self._path)
                if found == self._signature:
                    return
                # A network file system may briefly not find an existing file; a successor's
                # signature stays visible.
                if pause is not None:
                    time.sleep(pause)
        now = found.decode(errors="replace").strip() or "nobody: no lock file"
        raise _fenced(self._path, now, ", or its lock file was removed")

    def _acquire(self, patience_seconds: float, locking: str) -> bool:
        """Wait for the flock; return whether the file system granted it."""
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise self._refusal(self._owner()) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise SaveError(
                        f"{self._path} cannot be locked: {in_words(error)}",
                        path=self._path,
                        errno=error.errno,
                    ) from error
                if locking != "flock":
                    return False
                raise OptionsError(
                    f"{self._path} cannot be locked: {in_words(error)}; the file system "
                    "must support flock (Lustre does when mounted with -o flock), unless "
                    "the options do without it: Options(lock='lease') keeps a second job "
                    "out by a file that root rewrites every few seconds; with lock='none' "
                    "you must make sure that only one job runs at a time; read_only=True "
                    "is for a job that only restores",
                    path=self._path,
                    errno=error.errno,
                ) from error
            else:
                return True

    def _outlast_lease(self, patience_seconds: float) -> None:
        """Refuse to take the directory from a job whose lease is being renewed."""
        owner = self._owner()
        signed = _SIGNED.match(owner)
        if signed and not wait_for_end(self._root, signed[1], patience_seconds):
            raise self._refusal(owner)

    def _settle(self) -> None:
        """Leave the directory to the last of several jobs that took it at the same time."""
        time.sleep(_SETTLE_SECONDS)
        try:
            self.check()
        except FencedError as error:
            with os_errors_as(SaveError, "reading the lock", self._path):
                owner = _read_signature(self._path).decode(errors="replace").strip()
            raise self._refusal(owner) from error

    def _refusal(self, owner: str) -> LockedError:
        return LockedError(
            f"{self._path.parent} belongs to another running job ({owner}); two jobs "
            "would overwrite each other's checkpoints: end that job, or give this one a "
            "directory of its own",
            path=self._path,
        )

    def _owner(self) -> str:
        with suppress(OSError):
            return os.pread(self._descriptor, 500, 0).decode(errors="replace").strip()
        return "owner unknown"

    def close(self) -> None:
        """Release the directory; in a forked child, only forget it. Callable twice."""
        if self._lease is not None:
            self._lease.close()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_SIGNED = re.compile(r"job ([0-9a-z]+), ")


def refuse_if_taken_over(root: Path, job: str) -> None:
    """Require that no other job has signed a directory, of which root holds the lock.

    Not collective. For the other ranks that write. What they cannot read is no refusal:
    root checks before it publishes, and reports why it cannot.

    Raises:
        FencedError: On the calling rank, if another job has signed it.
    """
    found = ""
    with suppress(OSError):
        found = _read_signature(root / LOCK).decode(errors="replace").strip()
    if found.startswith("job ") and not found.startswith(f"job {job},"):
        raise _fenced(root / LOCK, found)


def _fenced(path: Path, owner: str, cause: str = "") -> FencedError:
    return FencedError(
        f"{path.parent} has been taken over from this job; it now belongs to {owner}. This "
        f"job was cut off from the directory{cause}; it may not save here any more: end it",
        path=path,
    )


def signed_job(root: Path) -> str | None:
    """Return the job that has signed a directory, as this host sees it.

    Not collective. None if no job has, or the file cannot be read.
    """
    with suppress(OSError):
        found = _SIGNED.match(_read_signature(root / LOCK).decode(errors="replace"))
        return found[1] if found else None
    return None


def _read_signature(path: Path) -> bytes:
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return b""
    try:
        # Linux's NFS client keeps its cached bytes of a file that is open for writing, as a
        # file must be to be locked, whatever other clients have written since.
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(descriptor, 500, 0)
    finally:
        os.close(descriptor)


_HELD: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked data-loader worker shares the open file: without this it would hold the lock
    # after the death of the process that took it.
    for lock in list(_HELD):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)
