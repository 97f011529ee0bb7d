# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt rescue``, which copies what hosts keep to the directory."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mpi_ckpt.cli.command import GOOD, command, directory_argument, misused
from mpi_ckpt.cli.plain_text import bytes_text
from mpi_ckpt.errors import OptionsError
from mpi_ckpt.storage.local.lineage import LINEAGE

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.screen import Screen


@command("rescue", "Copy the newest generation on the hosts to the directory.")
@click.argument("place", metavar="LOCAL")
@directory_argument()
def rescue(screen: Screen, place: str, directory: Path) -> int:
    """Copy the newest generation that hosts keep in LOCAL to the directory DIR.

    At the end of an allocation, or after a crash, with one process on each host:

      srun --ntasks-per-node=1 mpi-ckpt rescue /local/ssd/me /scratch/me/run

    LOCAL is the path given to Local. Every byte is proven. No job may use DIR meanwhile.
    Nothing is copied if DIR has a newer generation.
    """
    if not (directory / LINEAGE).exists():
        raise misused(
            f"{directory} has no {LINEAGE}: give the directory of a manager that has saved "
            "to hosts, with local=Local(...)"
        )
    # Here: no other command starts MPI.
    from mpi_ckpt.engine.hosts.copying import promoting

    try:
        rescued = promoting.rescue(place, directory)
    except OptionsError as error:  # of LOCAL, before anything is looked at
        raise misused(str(error)) from None
    if not rescued.is_root:
        return GOOD
    screen.data(
        {name: value for name, value in asdict(rescued).items() if name != "is_root"}
    )
    if not rescued.generation:
        screen.say("the directory has all that the hosts can complete")
        return GOOD
    screen.say(
        f"step {rescued.step} is generation {rescued.generation} of {directory}: "
        f"{bytes_text(rescued.nbytes)} in {rescued.seconds:.1f} s"
    )
    return GOOD
