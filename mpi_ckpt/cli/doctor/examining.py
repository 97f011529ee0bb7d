# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt doctor``, which checks what a job will use of this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from mpi_ckpt.cli.command import BAD, GOOD, command, directory_argument
from mpi_ckpt.cli.directory_kinds import require_target
from mpi_ckpt.cli.doctor.machine import check_launcher, check_mpi, check_software
from mpi_ckpt.cli.doctor.place import check_directory
from mpi_ckpt.cli.plain_text import plural
from mpi_ckpt.cli.tables import Column

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.doctor.checks import Check
    from mpi_ckpt.cli.screen import Screen

_COLUMNS = (Column("", states=True), Column(""), Column(""), Column(""))


@command("doctor", "Examine this machine and a directory.")
@directory_argument(required=False)
@click.option("--no-mpi", is_flag=True, help="Do not start MPI.")
def doctor(screen: Screen, directory: Path | None, no_mpi: bool) -> int:
    """Examine this machine, and DIR if it is given.

    MPI is started in a process of its own, as a job of one rank. Into DIR a few small
    files are written, and removed again. Exit code 1 if something is wrong.
    """
    if directory is not None:
        require_target(directory)
    checks = check_software()
    if not no_mpi:
        checks += check_mpi(os.environ)
    checks += check_launcher(os.environ)
    if directory is not None:
        checks += check_directory(directory)
    wrong = [check for check in checks if check.verdict == "wrong"]
    notes = [check for check in checks if check.verdict == "note"]
    screen.data({"good": not wrong, "checks": [check.to_json() for check in checks]})
    for area in dict.fromkeys(check.area for check in checks):
        screen.say(area, style="bold")
        _show(screen, [check for check in checks if check.area == area])
        screen.say()
    count = plural(len(wrong), "thing") if wrong else "nothing"
    style = "bold red" if wrong else "bold green"
    screen.say(f"{count} wrong, {plural(len(notes), 'note')}", style=style)
    return BAD if wrong else GOOD


def _show(screen: Screen, checks: list[Check]) -> None:
    """Show checks as a table, or on several lines each if it does not fit."""
    rows = [[check.verdict, check.name, check.found, check.advice] for check in checks]
    if screen.has_room(_COLUMNS, rows, indent=2):
        screen.table(_COLUMNS, rows, indent=2)
        return
    few, short = _COLUMNS[:3], [row[:3] for row in rows]
    if screen.has_room(few, short, indent=2):
        screen.table(few, short, indent=2, notes=[check.advice for check in checks])
        return
    for check in checks:
        screen.state(check.verdict, check.name, indent=2)
        for text in filter(None, (check.found, check.advice)):
            screen.say(f"        {text}")
