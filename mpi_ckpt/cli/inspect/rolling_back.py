# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt rollback``, which sets newer generations aside."""

from __future__ import annotations

import secrets
from contextlib import closing
from shlex import quote
from typing import TYPE_CHECKING

import click

from mpi_ckpt.cli.command import (
    GOOD,
    CommandError,
    command,
    directory_argument,
    generation_argument,
    lock_directory,
    misused,
)
from mpi_ckpt.cli.directory_kinds import directory_of_all
from mpi_ckpt.cli.generations import (
    bytes_freed,
    find_generation,
    find_published,
    look,
    newest_of,
    open_generation,
)
from mpi_ckpt.cli.plain_text import bytes_text, listed, plural
from mpi_ckpt.errors import CheckpointError, SaveError
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.directory.pins import bring_back_pinned
from mpi_ckpt.storage.directory.rollback import (
    bring_back,
    last_rolled_back,
    set_newer_aside,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.screen import Screen


@command("rollback", "Go back to an older generation.")
@directory_argument()
@generation_argument()
@click.option(
    "--undo", is_flag=True, help="Bring back what the last rollback has set aside."
)
def rollback(
    screen: Screen,
    directory: Path,
    generation: str | None,
    undo: bool,
) -> int:
    """Go back to GENERATION: set all newer ones aside; nothing is deleted.

    Restores, retention and prune see them no more; later saves do not take their numbers.
    --undo brings back all that was set aside since the last save. Refused while a job uses
    DIR.
    """
    directory = directory_of_all(directory, "rollback")
    if undo == (generation is not None):
        raise misused("give the GENERATION to go back to, or --undo")
    if generation is None:
        return _undo(screen, directory)
    return _go_back(screen, directory, generation)


def _go_back(screen: Screen, directory: Path, wanted: str) -> int:
    find_generation(directory, wanted)  # before a lock file is made
    job = secrets.token_hex(6)
    with closing(lock_directory(directory, job)):
        # A job that is cut off may be about to publish: after the sweep it never will.
        leftovers = bring_back_pinned(directory, recovery.survey(directory).partials)
        recovery.sweep(directory, leftovers, job)
        number, path = find_published(directory, wanted)
        step = _step_of(path)
        try:
            moved = set_newer_aside(directory, number)
        except SaveError as error:
            raise CommandError(_cut_off(directory, error)) from error
        following = recovery.survey(directory).next_generation
    everything = look(directory)
    rows = [row for row in everything if row.state == "rolled back"]
    screen.data(
        {
            "generation": number,
            "step": step,
            "set_aside": list(moved),
            "next_generation": following,
            "names": [row.name for row in rows],
        }
    )
    if moved:
        screen.say(f"set aside: {listed(moved)}")
    else:
        screen.say(f"nothing is newer than generation {number}; nothing was done")
    screen.say(
        f"a restore takes generation {number}, step {step}; "
        f"the next save becomes generation {following}"
    )
    if rows:
        # For the user to copy: never broken over two lines.
        where = quote(str(directory))
        screen.say(f"to undo: mpi-ckpt rollback {where} --undo", "dim", whole=True)
        freed = bytes_text(bytes_freed(rows, everything))
        free = f"to free {freed}: rm -r {where}/.rolled-back-*"
        screen.say(free, "dim", whole=True)
    return GOOD


def _undo(screen: Screen, directory: Path) -> int:
    if not last_rolled_back(directory):
        raise misused(f"{directory} holds nothing that a rollback has set aside", "absent")
    with closing(lock_directory(directory, secrets.token_hex(6))):
        there = set(recovery.survey(directory).generations)
        taken = sorted(there.intersection(last_rolled_back(directory)))
        if taken:
            raise CommandError(
                f"{directory} holds generations {listed(taken)} twice, published and set "
                "aside: somebody has copied them; move one copy of each elsewhere. "
                "Nothing was changed"
            )
        try:
            back = bring_back(directory)
        except SaveError as error:
            raise CommandError(_cut_off(directory, error)) from error
    left = recovery.survey(directory).rolled_back
    newest = newest_of(look(directory))
    manifest = None if newest is None else newest.manifest
    screen.data(
        {
            "back": list(back),
            "newest": manifest and manifest.generation,
            "still_aside": list(left),
        }
    )
    screen.say(f"back: {listed(back)}")
    if manifest is not None:
        since = ", saved since" if manifest.generation > back[-1] else ""
        screen.say(
            f"a restore takes generation {manifest.generation}, step {manifest.step}{since}"
        )
    if left:
        screen.say(
            f"{plural(len(left), 'generation')} of an earlier rollback still set aside: "
            f"mpi-ckpt rollback {quote(str(directory))} --undo",
            style="dim",
        )
    return GOOD


def _step_of(path: Path) -> int:
    try:
        with open_generation(path) as reader:
            return reader.manifest.step
    except CheckpointError as error:
        raise CommandError(
            f"{error}; no job could go on from it: choose another generation. Nothing was "
            "changed",
            kind="damaged",
        ) from error


def _cut_off(directory: Path, error: SaveError) -> str:
    return (
        f"{error}. Nothing was deleted; some may have been moved, as mpi-ckpt ls "
        f"{quote(str(directory))} shows. Run this again to go on, or with --undo to go back"
    )
