# SPDX-License-Identifier: Apache-2.0
"""Is there room for what is about to be written? Asked before the first byte.

Only a "no" that is sure refuses a save. What a file system says of itself is cheap to ask
and may be behind: space of files just deleted comes back late on xfs and btrfs. So before
it is believed the file system is asked to reserve the space, which makes it look again.
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
    """What a file system still takes; infinite where it does not say."""

    nbytes: float
    files: float


def free_space(path: Path) -> FreeSpace:
    """Ask a file system how much it still takes from this user.

    Not collective. Thread-safe.
    """
    try:
        status = os.statvfs(path)
    except OSError:  # whatever is wrong, the first write will say it
        return FreeSpace(float("inf"), float("inf"))
    # Blocks held back for root are root's to use. Some file systems in user space, and on
    # the network, answer 0 to what they do not know.
    blocks = status.f_bavail if os.geteuid() else status.f_bfree
    return FreeSpace(
        nbytes=blocks * status.f_frsize if status.f_blocks else float("inf"),
        files=status.f_favail or float("inf"),
    )


def require_space(directory: Path, what: Path, *, nbytes: int, files: int) -> None:
    """Refuse to begin what cannot be ended.

    Not collective. Costs one statvfs where there is room. A file system that tells
    nothing of itself is taken to have room; a quota is seen where statvfs tells of it
    (project quotas), else by the reservation of each larger file.

    Args:
        directory: Where files will be made; it may hold a probe for a moment.
        what: What is to be written, for the message: a directory or a file.
        nbytes: At least so many bytes will be written.
        files: At least so many files will be made.

    Raises:
        WriteError: On the calling rank, with ENOSPC, if that does not fit; it says how
            much is needed and how much there is.
    """
    free = free_space(directory)
    if files <= free.files and (
        nbytes <= free.nbytes or _can_reserve(directory / _PROBE, nbytes)
    ):
        return
    raise WriteError(
        f"{what}: {in_words(OSError(errno.ENOSPC, ''))}: "
        f"{_amount(nbytes, files)} needed, {_amount(free.nbytes, free.files)} free; "
        "nothing of it was written. An old generation is deleted once the new one is "
        "durable, so one more than are kept must fit: make room, or keep fewer "
        "(Options.retention)",
        path=what,
        errno=errno.ENOSPC,
    )


def _can_reserve(probe: Path, nbytes: int) -> bool:
    try:
        with filesystem.create_file(probe, direct=True) as descriptor:
            return filesystem.reserve(descriptor, nbytes)
    except OSError:
        return False
    finally:
        with suppress(OSError):  # it goes with the directory then
            filesystem.remove_file(probe)


def _amount(nbytes: float, files: float) -> str:
    told = [] if nbytes == float("inf") else [f"{nbytes:,} bytes"]
    told += [] if files == float("inf") else [f"{files:,} file{'s' * (files != 1)}"]
    return " and ".join(told)
