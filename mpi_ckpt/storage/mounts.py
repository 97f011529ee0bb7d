# SPDX-License-Identifier: Apache-2.0
"""File systems that this host is told to mount, and has not: what lies there is not there.

A directory made under an empty mount point is on another disk; a job that begins anew
there has lost sight of all it saved (fstab(5)).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["unmounted_above"]

_TABLE = Path("/etc/fstab")


def unmounted_above(path: Path) -> Path | None:
    """Return the mount point above a path at which nothing is mounted, if there is one.

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
        point = Path(fields[1].replace("\\040", " "))
        if point in (path, *path.parents) and not os.path.ismount(point):
            return point
    return None
