# SPDX-License-Identifier: Apache-2.0
"""Pins generations, which no retention then removes; beside a running job, without lock.

A pin is a file beside the generations. A job that removes a generation renames it, then
looks for a pin, and renames it back if there is one. Whoever pins makes the file, then
looks for the generation. So either the job sees the pin, or the one who pins sees that the
generation is gone. Not collective.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import CheckpointError, WriteError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory.recovery import is_gone
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.format.layout import generation_name, partial_number, pin_name
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

NOTE_CHARACTERS_MAX = 500

_PIN_BYTES = 4096
"""Always written as a whole, so that a new note replaces all of an older one."""

_PAUSES_SECONDS = (0.0, 0.05, 0.2, 0.5, 1.0)
"""When to look for a generation that a job may be about to rename back."""


def pin(root: Path, number: int, note: str) -> bool:
    """Pin a generation, or replace the note of its pin; durable when it returns.

    Args:
        root: The checkpoint directory.
        number: Number of the generation.
        note: Why, for people; cut to 500 characters.

    Returns:
        Whether it is pinned; if not, a job has removed the generation meanwhile.

    Raises:
        WriteError: If the pin cannot be written.
    """
    path = root / pin_name(number)
    facts = {"note": note[:NOTE_CHARACTERS_MAX], "time": time.time()}
    text = json.dumps(facts).ljust(_PIN_BYTES - 1) + "\n"
    with os_errors_as(WriteError, "pinning", path):
        try:
            with filesystem.create_file(path) as descriptor:
                filesystem.write_all(descriptor, text.encode(), 0)
                filesystem.sync_file(descriptor)
        except FileExistsError:
            filesystem.rewrite_file(path, text.encode())
        filesystem.sync_directory(root, if_possible=True)
    for pause in _PAUSES_SECONDS:
        time.sleep(pause)
        if not is_gone(root / generation_name(number)):
            return True
    unpin(root, number)
    return False


def unpin(root: Path, number: int) -> bool:
    """Remove the pin of a generation; return whether there was one.

    Raises:
        WriteError: If it cannot be removed.
    """
    if not is_pinned(root, number):
        return False
    path = root / pin_name(number)
    with os_errors_as(WriteError, "unpinning", path):
        filesystem.remove_file(path)
        filesystem.sync_directory(root, if_possible=True)
    return True


def is_pinned(root: Path, number: int) -> bool:
    """Return whether a generation is pinned, or that cannot be known."""
    return not is_gone(root / pin_name(number))


def read_note(root: Path, number: int) -> str:
    """Return the note of a pin; empty if it has none that can be read."""
    try:
        found: Any = json.loads(filesystem.read_start(root / pin_name(number), _PIN_BYTES))
        return str(found["note"])[:NOTE_CHARACTERS_MAX]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def bring_back_pinned(root: Path, partials: Sequence[str]) -> tuple[str, ...]:
    """Publish pinned generations again whose removal was cut off; return the leftovers.

    The caller holds the lock.

    Args:
        root: The checkpoint directory.
        partials: Names of leftovers.
    """
    rest = []
    for name in partials:
        number = partial_number(name)
        target = root / generation_name(number)
        try:
            if not is_pinned(root, number) or not is_gone(target):
                rest.append(name)
                continue
            # CRASH: files are only deleted after a look for the pin: one that was seen
            # finds all of them here, and one made later pins nothing.
            GenerationReader(root / name).close()
            filesystem.rename_new(root / name, target)
            logger.warning("%s, whose removal was cut off, is pinned and back", target)
        except (CheckpointError, OSError) as error:
            logger.info("%s is pinned, but no whole generation: %s", root / name, error)
            rest.append(name)
    return tuple(rest)
