# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt pin`` and ``unpin``: no retention removes a pinned generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mpi_ckpt.cli.command import (
    GOOD,
    CommandError,
    command,
    directory_argument,
    generation_argument,
    misused,
)
from mpi_ckpt.cli.directory_kinds import directory_of_all
from mpi_ckpt.cli.generations import (
    find_generation,
    find_published,
    open_generation,
    parse_generation,
)
from mpi_ckpt.storage.directory import pins

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.screen import Screen


@command("pin", "Keep a generation, whatever retention says.")
@directory_argument()
@generation_argument(required=True)
@click.option("--note", default="", help="Why; `mpi-ckpt ls` shows it.")
def pin(screen: Screen, directory: Path, generation: str, note: str) -> int:
    """Keep GENERATION: neither a job's retention nor prune removes it until it is unpinned.

    May run beside a job. Once this has returned, the generation stays, also after a power
    cut. Pin it again to give it another note.
    """
    directory = directory_of_all(directory, "pin")
    number, path = find_published(directory, generation)
    with open_generation(path) as reader:
        step = reader.manifest.step
    if not pins.pin(directory, number, note):
        raise CommandError(
            f"{path} is gone: a job has pruned it, or set it aside, before it was pinned",
            kind="gone",
        )
    note = pins.read_note(directory, number)
    screen.data({"generation": number, "step": step, "pinned": True, "note": note})
    screen.say(f"generation {number}, step {step}, is pinned: no retention removes it")
    return GOOD


@command("unpin", "Let retention remove a generation again.")
@directory_argument()
@generation_argument(required=True)
def unpin(screen: Screen, directory: Path, generation: str) -> int:
    """Let a job's retention, or prune, remove GENERATION again, when they next choose.

    May run beside a job.
    """
    directory = directory_of_all(directory, "unpin")
    if generation == "newest":
        generation = find_generation(directory, generation).name
    number = parse_generation(generation)
    if not pins.unpin(directory, number):
        raise misused(f"generation {number} is not pinned", "absent")
    screen.data({"generation": number, "pinned": False})
    screen.say(f"generation {number} is no longer pinned")
    return GOOD
