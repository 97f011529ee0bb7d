# SPDX-License-Identifier: Apache-2.0
"""Checks that a save has space, and is seen by its writers, before its first byte.

A save is refused only if the space is certainly missing. The figures of a file system are
cheap to read but may lag behind: on xfs and btrfs the space of files just deleted comes
back late. So before a refusal the file system is asked to reserve the space, which makes it
check again.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.errors import WriteError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import in_words

if TYPE_CHECKING:
    from pathlib import Path

_PROBE = "reserve"


@dataclass(frozen=True, slots=True)
class FreeSpace:
    """Free space of a file system; infinite if it does not report it."""

    nbytes: float
    files: float


def free_space(path: Path) -> FreeSpace:
    """Return how much space a file system has left for this user.

    Not collective. Thread-safe.
    """
    try:
        status = os.statvfs(path)
    except OSError:  # the first write will report the fault
        return FreeSpace(float("inf"), float("inf"))
    # Only the root user may use reserved blocks. Some file systems in user space, and on
    # the network, report 0 for unknown values.
    blocks = status.f_bavail if os.geteuid() else status.f_bfree
    return FreeSpace(
        nbytes=blocks * status.f_frsize if status.f_blocks else float("inf"),
        files=status.f_favail or float("inf"),
    )


def require_space(directory: Path, what: Path, *, nbytes: int, files: int) -> None:
    """Refuse to begin a write that does not fit.

    Not collective. Costs one statvfs if there is space. A file system that reports nothing
    is assumed to have space. A quota shows in statvfs (project quotas), else in the
    reservation of each larger file.

    Args:
        directory: The directory of the files; it may briefly hold a probe.
        what: The directory or file to write, for the message.
        nbytes: Lower bound of the bytes to write.
        files: At least so many files will be made.

    Raises:
        WriteError: On the calling rank, with ENOSPC, if that does not fit; the message
            gives the needed and the free space.
    """
    free = free_space(directory)
    if files <= free.files and (
        nbytes <= free.nbytes or _can_reserve(directory / _PROBE, nbytes)
    ):
        return
    raise WriteError(
        f"{what}: {in_words(OSError(errno.ENOSPC, ''))}: {_amount(nbytes, files)} needed, "
        f"{_amount(free.nbytes, free.files)} free; nothing of it was written. An old "
        "generation is removed only after the new generation is durable, so the disk must "
        "hold one generation more than are kept: make room, or keep fewer "
        "(Options.retention)",
        path=what,
        errno=errno.ENOSPC,
    )


def require_visible(path: Path) -> None:
    """Require that a rank sees the partial that root has made. Not collective.

    Raises:
        WriteError: On the calling rank, if it does not.
        OSError: On the calling rank, if the directory cannot be listed.
    """
    try:
        filesystem.list_names(path)
    except FileNotFoundError as error:
        raise WriteError(
            f"{path}: root has made it, and this host does not see it. Several writers, "
            "and state that is cut over ranks, need a directory that all ranks see; "
            "Options(writers='root') without such state does not",
            path=path,
            errno=error.errno or errno.ENOENT,
        ) from error


def _can_reserve(probe: Path, nbytes: int) -> bool:
    try:
        with filesystem.create_file(probe, direct=True) as descriptor:
            return filesystem.reserve(descriptor, nbytes)
    except OSError:
        return False
    finally:
        with suppress(OSError):  # the directory's removal deletes it then
            filesystem.remove_file(probe)


def _amount(nbytes: float, files: float) -> str:
    amounts = [] if nbytes == float("inf") else [f"{nbytes:,} bytes"]
    amounts += [] if files == float("inf") else [f"{files:,} file{'s' * (files != 1)}"]
    return " and ".join(amounts)
