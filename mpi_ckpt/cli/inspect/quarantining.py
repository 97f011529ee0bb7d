# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt quarantine``, which keeps a generation from restores."""

from __future__ import annotations

import secrets
from contextlib import closing
from typing import TYPE_CHECKING

import click

from mpi_ckpt.cli.command import (
    GOOD,
    CommandError,
    command,
    directory_argument,
    generation_argument,
    lock_directory,
)
from mpi_ckpt.cli.directory_kinds import directory_of_all
from mpi_ckpt.cli.generations import find_generation, find_published, look, newest_of
from mpi_ckpt.errors import CorruptGenerationError
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.format.layout import QUARANTINE

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.screen import Screen


@command("quarantine", "Set a bad generation aside.")
@directory_argument()
@generation_argument(required=True)
@click.option(
    "--reason",
    default="set aside by hand",
    show_default=True,
    help="The reason; stored beside the generation.",
)
def quarantine(screen: Screen, directory: Path, generation: str, reason: str) -> int:
    """Set a generation aside in DIR/.quarantine; nothing is deleted.

    Restores then take the newest good one that is left. Refused while a job uses DIR.
    """
    directory = directory_of_all(directory, "quarantine")
    find_generation(directory, generation)  # before a lock file is made
    with closing(lock_directory(directory, secrets.token_hex(6))):
        number, path = find_published(directory, generation)
        problem = CorruptGenerationError(reason, path=path, generation=number)
        target = recovery.quarantine(directory, number, problem)
    if target == path:
        raise CommandError(f"{path} could not be moved; it is where it was")
    left = newest_of(look(directory))
    newest = None if left is None else left.manifest
    screen.data(
        {
            "generation": number,
            "path": str(target),
            "reason": reason,
            "newest": newest and newest.generation,
        }
    )
    screen.say(f"generation {number} is now in {target}")
    if newest is not None:
        screen.say(f"a restore takes generation {newest.generation}, step {newest.step}")
    else:
        screen.say(
            "no good generation is left, and a restore will refuse to start from nothing: "
            f"to start anew, move {directory / QUARANTINE} elsewhere",
            aside=True,
        )
    return GOOD
