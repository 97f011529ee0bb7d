# SPDX-License-Identifier: Apache-2.0
"""The raw limits: the same bytes through the same device with nothing around them."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy as np

__all__ = ["drop_cache", "read_direct", "write_buffered", "write_direct"]

_BLOCK = 8 << 20


def write_buffered(path: Path, arrays: Iterable[np.ndarray]) -> None:
    """Write arrays through the page cache, then fsync."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for array in arrays:
            view = memoryview(array).cast("B")
            while view:
                view = view[os.write(descriptor, view[: 1 << 30]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_direct(path: Path, nbytes: int) -> None:
    """Write as many bytes by O_DIRECT from one aligned block, then fsync."""
    block = mmap.mmap(-1, _BLOCK)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT
    descriptor = os.open(path, flags, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        for offset in range(0, nbytes, _BLOCK):
            os.pwrite(descriptor, block, offset)
        os.ftruncate(descriptor, nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_direct(path: Path) -> None:
    """Read a file by O_DIRECT into one aligned block, over and over."""
    block = mmap.mmap(-1, _BLOCK)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        offset = 0
        while count := os.preadv(descriptor, [block], offset):
            offset += count
    finally:
        os.close(descriptor)


def drop_cache(root: Path) -> None:
    """Drop the pages of all files below a directory from the page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
