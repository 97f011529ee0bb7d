# SPDX-License-Identifier: Apache-2.0
"""Finds what this host has mounted, and which mounts of its fstab are missing.

A directory made under an empty mount point is on another disk; a job that starts afresh
there does not see its earlier saves (fstab(5)).
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

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
