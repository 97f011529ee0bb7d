# SPDX-License-Identifier: Apache-2.0
"""Makes a file that a user asked for: complete and durable, or not at all."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpi_ckpt.cli.command import misused
from mpi_ckpt.errors import WriteError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import os_errors_as

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def new_file(target: Path) -> Iterator[int]:
    """Yield the descriptor of a file that gets its name once it is complete and durable.

    Args:
        target: The file, which must not exist.

    Raises:
        CommandError: If it exists, or its directory does not.
        WriteError: If it cannot be written; nothing is left of it.
    """
    parent = target.absolute().parent
    if target.is_symlink() or target.exists():
        raise misused(f"{target} exists, and is not overwritten", "exists")
    if not parent.is_dir():
        raise misused(f"{parent} is no directory")
    partial = parent / f".mpi-ckpt-export-{secrets.token_hex(6)}"
    try:
        with os_errors_as(WriteError, "writing", target):
            with filesystem.create_file(partial) as descriptor:
                yield descriptor
                filesystem.sync_file(descriptor)
            filesystem.rename_new(partial, parent / target.name)
            filesystem.sync_directory(parent, if_possible=True)
    finally:
        filesystem.remove_file(partial)
