# SPDX-License-Identifier: Apache-2.0
"""Takes ownership of a checkpoint directory, and checks mounts and other conditions.

These faults show at the start, before a job trains for hours: a directory that is not
writable, a file system without locks or without durable names.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mpi_ckpt.errors import OptionsError, SaveError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.owning.lock import DirectoryLock

if TYPE_CHECKING:
    from mpi_ckpt.options import Locking

logger = logging.getLogger(__name__)


_TABLE = Path("/etc/fstab")
_MOUNTED = Path("/proc/self/mountinfo")

IN_MEMORY = ("tmpfs", "ramfs")
"""File systems that a power cut empties."""

_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "ramfs", "overlay")


def unmounted_above(path: Path) -> Path | None:
    """Return the mount point above a path at which nothing is mounted, if any.

    Not collective. Thread-safe.

    Args:
        path: Absolute; it need not exist.
    """
    lines: list[str] = []
    with suppress(OSError, UnicodeDecodeError):
        lines = _TABLE.read_text().splitlines()
    for line in lines:
        fields = line.split()
        if len(fields) < 4 or fields[0].startswith("#") or not fields[1].startswith("/"):
            continue
        point = Path(_unescaped(fields[1]))
        if point in (path, *path.parents) and not os.path.ismount(point):
            return point
    return None


def local_file_system(path: Path) -> str | None:
    """Return the kind of a path's file system, if it is local to this host.

    Not collective. Thread-safe. None if it may be shared, or is unknown (proc(5)).

    Args:
        path: Absolute; it need not exist.
    """
    kinds: dict[str, str] = {}
    with suppress(OSError, UnicodeDecodeError):
        for line in _MOUNTED.read_text().splitlines():
            place, _, source = line.partition(" - ")
            # The last file system mounted at a place is the visible one.
            kinds[_unescaped(place.split()[4])] = source.split()[0]
    real = Path(os.path.realpath(path))
    for above in (real, *real.parents):
        if (kind := kinds.get(str(above))) is not None:
            return kind if kind in _LOCAL else None
    return None


def survived_losses(path: Path) -> list[str]:
    """Return which losses a durable file at a path survives: see `SaveReport`.

    Not collective. Thread-safe.
    """
    kind = local_file_system(path)
    if kind is None:
        return ["process", "host", "power", "site"]
    return ["process"] if kind in IN_MEMORY else ["process", "power"]


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


_LOST = (
    "after a power cut the last saves may be gone or damaged, though they were "
    "acknowledged, and an older one is then restored"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """How a job owns its directory.

    Attributes:
        locking: How a second job is kept out; see `DirectoryLock`.
        read_only: Whether the job only reads it (True), needs it writable (False), or reads
            it if it is not writable (None).
        sync_names: Whether to refuse a file system that cannot fsync directories.
    """

    locking: Locking | Literal["either"] = "flock"
    read_only: bool | None = None
    sync_names: bool = True

    def take(self, root: Path, job: str) -> DirectoryLock:
        """Make a directory if it is missing, and lock it.

        Not collective.

        Raises:
            LockedError: On the calling rank, if another job holds it.
            OptionsError: On the calling rank, if it is to be read only, or the file system
                lacks locks or the fsync of directories that the options ask for.
            SaveError: On the calling rank, if it cannot be written to.
        """
        if self.read_only:
            raise OptionsError(
                f"nothing is saved to {root}: Options(read_only=True)", path=root
            )
        _refuse_unmounted(root)
        with os_errors_as(SaveError, "making", root):
            filesystem.make_directories(root)
        try:
            with os_errors_as(SaveError, "making names durable in", root):
                filesystem.sync_directory(root)
        except SaveError as error:
            self._do_without_synced_names(root, error)
        lock = DirectoryLock(root, job, locking=self.locking)
        # A lock file that was there already shows nothing of the directory. access() asks
        # for the real user, who may be another one than writes.
        is_asked = os.getuid() == os.geteuid()
        if is_asked and not os.access(root, os.W_OK | os.X_OK):
            lock.close()
            with os_errors_as(SaveError, "making files in", root):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        _warn_if_open_to_all(root)
        return lock

    def read_without(self, refusal: SaveError) -> None:
        """Log that the job reads the directory without owning it, and why; or raise.

        Not collective.

        Raises:
            SaveError: On the calling rank, if it must be writable.
        """
        if self.read_only is False:
            raise refusal
        # A full or failing disk may still be readable, and have space later.
        logger.warning(
            "restoring without a lock, as a reader does: %s. A save would fail as well: "
            "give Options(read_only=True) if this job only restores, read_only=False to "
            "fail at once",
            refusal,
        )

    def _do_without_synced_names(self, root: Path, failure: SaveError) -> None:
        if failure.errno not in filesystem.NO_DIRECTORY_SYNC:
            raise failure
        if self.sync_names:
            raise OptionsError(
                f"{failure}: this file system has no fsync of directories (CIFS and some "
                "FUSE have none), so nothing makes the name of a save durable: "
                f"{_LOST}. "
                "Options(io=IO(sync_directories=False)) saves here all the same",
                path=root,
                errno=failure.errno,
            ) from failure
        logger.warning("%s has no fsync of directories: %s", root, _LOST)


def _refuse_unmounted(root: Path) -> None:
    # A directory made there would be on the wrong disk. What cannot be looked at counts as
    # missing: making it will report the error.
    if not os.path.exists(root) and (point := unmounted_above(root)) is not None:  # noqa: PTH110
        raise SaveError(
            f"{root} lies under {point}, where /etc/fstab mounts a file system, and "
            "nothing is mounted there",
            path=root,
        )


def _warn_if_open_to_all(root: Path) -> None:
    # A directory writable by its group is for teamwork; one writable by all is not.
    with suppress(OSError):
        mode = root.stat().st_mode
        if mode & stat.S_IWOTH:
            harm = "add" if mode & stat.S_ISVTX else "add, change and remove"
            logger.warning(
                "any user of this system may %s generations in %s: chmod o-w", harm, root
            )
