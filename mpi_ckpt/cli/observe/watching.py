# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt watch``, a live page about the job that uses a directory."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from mpi_ckpt.cli.command import GOOD, command, directory_argument
from mpi_ckpt.cli.directory_kinds import directory_of_all, kind_of
from mpi_ckpt.cli.observe.job_view import view_job
from mpi_ckpt.cli.plain_text import age, bytes_text, listed, plural
from mpi_ckpt.cli.tables import Column

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.observe.job_view import JobView
    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.storage.format.manifest import Manifest


@command("watch", "Watch the job that uses a directory.")
@directory_argument()
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
@click.option("--once", is_flag=True, help="Look once, and print what is seen.")
def watch(screen: Screen, directory: Path, every: float, once: bool) -> int:
    """Show what the job that uses DIR does now: phase, rate, last and next save, space.

    Reads only, takes no lock and needs no MPI, so it may run anywhere that sees DIR. Ends
    with Ctrl-C. Looks once if the output is no terminal, or with --json.
    """
    if kind_of(directory) != "empty":  # there before the first save
        directory = directory_of_all(directory, "watch")
    known: dict[int, Manifest] = {}
    if once or not screen.is_terminal:
        view = view_job(directory, known)
        screen.data(view.to_json())
        _draw(screen, view)
        return GOOD
    with suppress(KeyboardInterrupt), screen.live() as show:
        while True:
            _draw(screen, view_job(directory, known))
            show()
            time.sleep(every)
    return GOOD


def _draw(screen: Screen, view: JobView) -> None:
    screen.say(str(view.directory), style="bold")
    screen.facts(view.facts())
    screen.say()
    names = sorted({name for manifest in view.manifests for name in manifest.metrics})
    columns = [
        Column("generation"),
        Column("step", right=True),
        Column("saved", right=True, spare=1),
        Column("size", right=True, spare=2),
        Column("ranks", right=True, spare=4),
        *(Column(name, right=True, foreign=True, spare=3) for name in names),
        *([Column("pinned", names=True, spare=5)] if view.pinned else []),
    ]
    rows = []
    for manifest in reversed(view.manifests):
        values = [manifest.metrics.get(name) for name in names]
        number = manifest.generation
        note = view.pinned.get(number)
        rows.append(
            [
                *(number, manifest.step, age(manifest.time, view.now)),
                *(bytes_text(manifest.nbytes), manifest.size),
                *("" if value is None else f"{value:.5g}" for value in values),
                *(["" if note is None else note or "yes"] if view.pinned else []),
            ]
        )
    screen.table(columns, rows)
    if view.unreadable:
        screen.say(
            f"cannot be read: {listed(view.unreadable)}; mpi-ckpt ls says why",
            style="yellow",
        )
    older = view.count - len(view.manifests) - len(view.unreadable)
    if older > 0:
        screen.say(f"and {plural(older, 'older generation')}", style="dim")
