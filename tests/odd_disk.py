# SPDX-License-Identifier: Apache-2.0
"""A file system that lacks something, or lies: mounted for a block of a test.

Served by ``programs/odd_disk.py``, which ends by itself after a while: nothing hangs on it
for longer. See `OddDisk.be` for what can be odd about it.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import json
import os
from typing import TYPE_CHECKING

from tests.fuse import NotHereError, served
from tests.waiting import limit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIFETIME = 280  # seconds: less than a test may take

_PROGRAM = "tests.programs.odd_disk"


class OddDisk:
    """A file system that is mounted.

    Attributes:
        path: Where it is.
        backing: The directory that holds what is in it: the truth, behind its back.
    """

    def __init__(self, folder: Path, backing: Path | None = None) -> None:
        self.path = folder / "disk"
        self.backing = backing or folder / "backing"
        self.switches = folder / "switches"
        for made in (self.path, self.backing, self.switches):
            made.mkdir(exist_ok=True, parents=True)

    def be(self, **switches: object) -> None:
        """Set switches; those that are None are turned off.

        Errors are given by name. Every call that a switch is about goes by it until it is
        turned off; ``listing`` and ``open`` are about one call.

        Args:
            flock: An error; ``"ignored"``: all who ask have the lock. Only where the server
                keeps the locks.
            link: An error, but for ENOSYS, which the kernel takes for good; ``"copy"``: a
                link is another file; ``"symlink"``: it is a symbolic link, which the kernel
                tells as EIO; ``"posing symlink"``: it is one, and nothing is told.
            direct: An error where a file is opened with O_DIRECT; it is made all the same.
            sync_dir: An error of the fsync of a directory.
            open_dir: An error where a directory is opened in order to fsync it.
            sync_file: An error of the fsync of a file.
            sync_seconds: How long each fsync takes.
            fallocate: An error.
            listing: A dict. ``lie``: an error; ``"empty"``; ``"short"``, the first half of
                the names; ``"old"``, what it was ``back`` changes ago; ``"names"``, those
                given as ``names``. ``at``: which listing lies, from now on, counted from
                1; ``times``: how many do; ``name``: of which directory, by its last part.
            open: A dict likewise, of a file that is there: ``lie`` an error. The kernel
                asks twice before it tells of ESTALE.
        """
        for name, value in switches.items():
            path = self.switches / name
            if value is None:
                path.unlink(missing_ok=True)
                continue
            fresh = self.switches / f".{name}"
            fresh.write_text(json.dumps(value))
            fresh.rename(path)

    def fired(self) -> list[str]:
        """Return which turns of ``listing`` and ``open`` have come, and forget them."""
        path = self.switches / "fired"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@contextlib.contextmanager
def odd_disk(
    folder: Path,
    *,
    backing: Path | None = None,
    locks: str = "server",
    seconds: int = LIFETIME,
    **switches: object,
) -> Iterator[OddDisk]:
    """Mount an odd disk for the block.

    Args:
        folder: Where it is mounted and switched; need not exist, is not removed.
        backing: The directory that holds what is in it; one in the folder for None. Two
            disks over one are two hosts that see one file server.
        locks: Who keeps the locks of flock: ``"server"``, so that two disks over one
            directory exclude one another; ``"kernel"``, so that each host has its own.
        seconds: After so many it ends by itself, whatever happens.
        switches: Likewise set from the start; see `OddDisk.be`.

    Raises:
        NotHereError: If something that it takes is missing.
    """
    reason = why_not()
    if reason:
        raise NotHereError(reason)
    disk = OddDisk(folder, backing)
    disk.be(**switches)
    arguments = (disk.path, disk.backing, disk.switches, locks, int(limit(seconds)))
    # Where the older library is there as well, it would be taken.
    with served(disk.path, _PROGRAM, arguments, {"FUSE_LIBRARY_NAME": "fuse3"}):
        yield disk


def why_not() -> str:
    """Tell why no odd disk can be had here; empty if it can."""
    if os.geteuid() != 0:
        return "mounting takes root"
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing"
    if importlib.util.find_spec("mfusepy") is None:
        return "mfusepy is missing: pip install mfusepy"
    if ctypes.util.find_library("fuse3") is None:
        return "libfuse3.so.3 is missing: apt-get install libfuse3-3"
    return ""
