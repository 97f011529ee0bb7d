# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt ls``, which lists the generations of a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.cli.command import GOOD, command, directory_argument
from mpi_ckpt.cli.directory_kinds import directory_of_all
from mpi_ckpt.cli.generations import lock_holder, look
from mpi_ckpt.cli.plain_text import bytes_text, plural
from mpi_ckpt.cli.tables import Column
from mpi_ckpt.storage.format.layout import QUARANTINE

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.generations import Row
    from mpi_ckpt.cli.screen import Screen

_SOUND = ("newest", "ok", "gone", "partial", "rolled back")


@command("ls", "List the generations in a directory.", dates=True)
@directory_argument()
def list_generations(screen: Screen, directory: Path) -> int:
    """List the generations in DIR: step, age, size, ranks, state.

    "shared" is what a generation has in common with others by hard link. States: newest
    (what a restore takes), ok, damaged (names, sizes or headers are wrong; verify looks at
    every byte), quarantined, rolled back (set aside by a rollback), partial (being written
    or removed, or left over), gone (pruned by a job while this looked).
    """
    directory = directory_of_all(directory, "ls")
    rows = look(directory)
    holder = lock_holder(directory)
    on_disk = sum(size for _, _, size in frozenset().union(*(r.inodes for r in rows)))
    screen.data(
        {
            "directory": str(directory),
            "generations": [row.to_json() for row in rows],
            "bytes_on_disk": on_disk,
            "lock_holder": holder,
        }
    )
    metrics = sorted({name for r in rows if r.manifest for name in r.manifest.metrics})
    screen.table(_columns(metrics), [_cells(screen, row, metrics) for row in rows])
    for row in rows:
        if row.reason and row.state not in _SOUND:
            screen.say(f"{row.name}: {row.reason}", style="red")
    there = [r for r in rows if r.name.startswith("checkpoint-") and r.state != "gone"]
    text = f"{plural(len(there), 'generation')}, {bytes_text(on_disk)} on disk"
    screen.say(text, style="dim")
    if holder is not None:
        screen.say(f"in use by {holder}", style="dim")
    return GOOD


def _columns(metrics: list[str]) -> list[Column]:
    return [
        Column("generation", names=True),
        Column("step", right=True, spare=1),
        Column("saved", right=True, spare=3),
        Column("size", right=True, spare=2),
        Column("shared", right=True, spare=6),
        Column("ranks", right=True, spare=5),
        *(Column(name, right=True, foreign=True, spare=4) for name in metrics),
        Column("state", states=True),
    ]


def _cells(screen: Screen, row: Row, metrics: list[str]) -> list[str]:
    manifest = row.manifest
    number = row.name.removeprefix(f"{QUARANTINE}/")
    if row.state == "rolled back":
        number = f"checkpoint-{number.rpartition('-')[2]}"
    if number.startswith("checkpoint-"):
        number = number.removeprefix("checkpoint-").lstrip("0") or "0"
    if manifest is None:
        said = ["", "", "", *("" for _ in metrics)]
    else:
        values = [manifest.metrics.get(name) for name in metrics]
        shown = ["" if value is None else f"{value:.5g}" for value in values]
        said = [str(manifest.step), screen.saved(manifest.time), str(manifest.size), *shown]
    size, shared = bytes_text(row.nbytes), bytes_text(row.shared)
    return [number, said[0], said[1], size, shared, *said[2:], row.state]
