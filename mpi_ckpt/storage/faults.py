# SPDX-License-Identifier: Apache-2.0
"""Turns an OSError into words, or into an error of this package with the operation."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpi_ckpt.errors import CheckpointError, RestoreError, SaveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ADVICE = {
    errno.ENOTDIR: "a file is where a directory is needed: give the manager a directory",
    errno.EACCES: "this user may not do that there: look at owner and mode of the path",
    errno.ENOSPC: "the file system is full",
    errno.EDQUOT: "the quota is used up, which the free space does not show",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file-size limit of the process or the file system is reached",
    errno.EXDEV: "the directory spans several file systems",
}


def in_words(error: OSError) -> str:
    """Return the name and text of an OSError, and what it means for checkpoints.

    Not collective. Thread-safe. Without the file, which the message names elsewhere.
    """
    code = error.errno or 0
    name = errno.errorcode.get(code, type(error).__name__)
    text = os.strerror(code) if code else str(error)
    advice = f"; {_ADVICE[code]}" if code in _ADVICE else ""
    return f"{name} ({text}){advice}"


@contextmanager
def os_errors_as(error: type[CheckpointError], doing: str, path: Path) -> Iterator[None]:
    """Raise ``error`` for any OSError of the block. Not collective. Thread-safe.

    Args:
        error: Class to raise; errors of this package pass unchanged.
        doing: The operation of the block, such as "write of".
        path: Its file or directory, unless the OSError names a file itself.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as cause:
        where = cause.filename or path
        text = f"{doing} {where} failed: {in_words(cause)}"
        raise error(text, path=where, errno=cause.errno or 0) from cause


@contextmanager
def read_errors_as_save_errors() -> Iterator[None]:
    """Raise a SaveError if a save cannot read a file. Not collective. Thread-safe.

    A save promises one error class for all faults of the disk.
    """
    try:
        yield
    except RestoreError as error:
        raise SaveError(
            error.message,
            path=error.path,
            generation=error.generation,
            errno=error.errno,
            problems=error.problems,
        ) from error
