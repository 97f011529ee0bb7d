# SPDX-License-Identifier: Apache-2.0
"""Sets newer generations aside under names that no search matches, and brings them back.

Each generation gets a new name by a rename within its directory: at any moment it is
complete, under one of the two names. Nothing is deleted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.errors import SaveError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory.recovery import settled_survey
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.format.layout import (
    generation_name,
    rolled_back_name,
    rolled_back_numbers,
)

if TYPE_CHECKING:
    from pathlib import Path


def set_newer_aside(root: Path, generation: int) -> tuple[int, ...]:
    """Set aside all generations newer than a given one; durable when it returns.

    Not collective. The caller holds the lock, and has swept leftovers of others.

    Args:
        root: The checkpoint directory.
        generation: The newest generation that stays.

    Returns:
        The numbers of the generations set aside, oldest first.

    Raises:
        ReadError: On the calling rank, if the directory cannot be listed.
        SaveError: On the calling rank, if it cannot be changed; some may have been set
            aside, and another call continues with the rest.
    """
    found = settled_survey(root)
    newer = [number for number in found.generations if number > generation]
    # CRASH: the newest is renamed first, so that the rest always equals the directory
    # before some save. The new name records the first newest number: interrupted and called
    # again, it still counts as one rollback.
    with os_errors_as(SaveError, "setting generations aside", root):
        for number in newer:
            target = root / rolled_back_name(number, found.highest)
            filesystem.rename_new(root / generation_name(number), target)
        if newer:
            filesystem.sync_directory(root, if_possible=True)
    return tuple(reversed(newer))


def last_rolled_back(root: Path) -> tuple[int, ...]:
    """Return the numbers that `bring_back` would bring back, oldest first.

    Not collective.

    Raises:
        ReadError: On the calling rank, if the directory cannot be listed.
    """
    return tuple(sorted(_last(root)))


def bring_back(root: Path) -> tuple[int, ...]:
    """Undo the rollbacks since the last save; durable when it returns.

    Not collective. The caller holds the lock.

    Args:
        root: The checkpoint directory.

    Returns:
        The numbers of the generations brought back, oldest first; empty if there were none.

    Raises:
        ReadError: On the calling rank, if the directory cannot be listed.
        SaveError: On the calling rank, if it cannot be changed; some may be back, and
            another call continues with the rest.
    """
    names = _last(root)
    # CRASH: the oldest is renamed first, so that here too the rest always equals the
    # directory before some save.
    with os_errors_as(SaveError, "bringing generations back", root):
        for number in sorted(names):
            filesystem.rename_new(root / names[number], root / generation_name(number))
        if names:
            filesystem.sync_directory(root, if_possible=True)
    return tuple(sorted(names))


def _last(root: Path) -> dict[int, str]:
    rolled_back = {
        name: rolled_back_numbers(name) for name in settled_survey(root).rolled_back
    }
    last = max((pair[1] for pair in rolled_back.values() if pair), default=0)
    return {pair[0]: name for name, pair in rolled_back.items() if pair and pair[1] == last}
