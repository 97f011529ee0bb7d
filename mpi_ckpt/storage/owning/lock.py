# SPDX-License-Identifier: Apache-2.0
"""Locks a checkpoint directory for one job, by an flock, or by a lease where none works.

If the file system has no flock, a lease shows whether a job is alive.

A holder can lose its lock without notice: a node is cut off, the file server gives the lock
to a successor, and the old job lives on. So the lock file also names its owner. The last
job to sign it is the owner; a job that finds another name there is fenced off.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import stat
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from mpi_ckpt.errors import FencedError, LockedError, OptionsError, SaveError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import in_words, os_errors_as
from mpi_ckpt.storage.format.layout import LOCK, lease_name, leased_job

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.options import Locking

logger = logging.getLogger(__name__)


RENEW_SECONDS = 5.0
TERM_SECONDS = 30.0
"""After so long without a renewal a job is taken for dead: five of them may fail."""

_POLL_SECONDS = 0.25
_BYTES_MAX = 64


class Lease:
    """The lease of one job, renewed by a thread until it is closed.

    Root only. Not thread-safe.

    Args:
        root: The checkpoint directory; must exist.
        job: Name of the job.

    Raises:
        SaveError: On the calling rank, if the file cannot be made.
    """

    def __init__(self, root: Path, job: str) -> None:
        self._path = root / lease_name(job)
        self._process = os.getpid()
        self._ended = threading.Event()
        with (
            os_errors_as(SaveError, "making the lease", self._path),
            filesystem.create_file(self._path) as descriptor,
        ):
            filesystem.write_all(descriptor, _renewal(0), 0)
            filesystem.sync_file(descriptor)
        self._thread = threading.Thread(
            target=self._renew_on, name="mpi_ckpt lease", daemon=True
        )
        self._thread.start()

    def _renew_on(self) -> None:
        count, warned = 0, False
        while not self._ended.wait(RENEW_SECONDS):
            count += 1
            try:
                filesystem.rewrite_file(self._path, _renewal(count))
            except FileNotFoundError:
                # A successor has removed it; the next save finds that in the signature.
                logger.warning("%s is gone: another job has taken over", self._path)
                return
            except OSError as error:
                if not warned:
                    logger.warning(
                        "the lease %s cannot be renewed: %s. Tried again every %g s; after "
                        "%g s another job may take the directory over from this one",
                        self._path,
                        in_words(error),
                        RENEW_SECONDS,
                        TERM_SECONDS,
                    )
                warned = True

    def close(self) -> None:
        """End the lease; in a forked child, do nothing. Callable twice."""
        if self._process != os.getpid() or self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(RENEW_SECONDS)  # no longer: a file server may be unreachable
        with suppress(OSError):  # the lease then ends by time
            filesystem.remove_file(self._path)


def wait_for_end(root: Path, job: str, patience_seconds: float) -> bool:
    """Wait until the lease of a job has ended, or proves the job alive.

    Not collective.

    Args:
        root: The checkpoint directory.
        job: Name of the job.
        patience_seconds: How long a live job may take to end.

    Returns:
        Whether it has ended: it was removed, did not change for a term, or never existed.

    Raises:
        SaveError: On the calling rank, if it cannot be read.
    """
    path = root / lease_name(job)
    begun = changed = time.monotonic()
    before = _read(path)
    while before is not None:
        time.sleep(_POLL_SECONDS)
        found, now = _read(path), time.monotonic()
        if found != before:
            before, changed = found, now
        elif now - changed >= TERM_SECONDS:
            return True
        if changed > begun and found is not None and now - begun >= patience_seconds:
            return False
    return True


def remove_other_leases(root: Path, job: str) -> None:
    """Remove the leases of dead or fenced off jobs. Not collective.

    The caller has signed the lock. A lease that cannot be removed stays and does no harm.
    """
    with suppress(OSError):
        for name in filesystem.list_names(root):
            if leased_job(name) not in (None, job):
                filesystem.remove_file(root / name)


def _renewal(count: int) -> bytes:
    return f"{count:020d}\n".encode()


def _read(path: Path) -> bytes | None:
    with os_errors_as(SaveError, "reading the lease", path):
        try:
            return filesystem.read_start(path, _BYTES_MAX)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise SaveError(f"{error}: somebody has put it there; remove it") from error


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
            FencedError: On the calling rank, if another job has signed the file, or it or
                its directory is gone.
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
        if not found and not os.path.lexists(self._root):
            raise FencedError(
                f"{self._root} is gone: it was removed or moved away while this job used "
                "it, and no save can go there: end this job, and start it again with the "
                "directory that holds its generations now",
                path=self._path,
            )
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
