# SPDX-License-Identifier: Apache-2.0
"""``mpi-ckpt ls``: the generations of a directory, one a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.cli.command import GOOD, command, directory_argument
from mpi_ckpt.cli.screen import age, bytes_text, plural
from mpi_ckpt.cli.survey import lock_holder, look
from mpi_ckpt.storage.layout import QUARANTINE

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.cli.survey import Row

__all__ = ["list_generations"]

_SOUND = ("newest", "ok", "gone", "partial", "rolled back")


@command("ls")
@directory_argument()
def list_generations(screen: Screen, directory: Path) -> int:
    """List the generations in DIR: step, age, size, ranks, state.

    "shared" is what a generation has in common with others by hard link. States: newest
    (what a restore takes), ok, damaged (names, sizes or headers are wrong; verify looks at
    every byte), quarantined, rolled back (set aside by a rollback), partial (being written
    or removed, or left over), gone (pruned by a job while this looked).
    """
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
    screen.table(
        ["generation", ">step", ">saved", ">size", ">shared", ">ranks"]
        + [f">{name}" for name in metrics]
        + ["state"],
        [_cells(row, metrics) for row in rows],
    )
    for row in rows:
        if row.reason and row.state not in _SOUND:
            screen.say(f"{row.name}: {row.reason}", style="red")
    there = [r for r in rows if r.name.startswith("checkpoint-") and r.state != "gone"]
    if not rows:
        screen.say(f"{directory} holds no generation")
    else:
        text = f"{plural(len(there), 'generation')}, {bytes_text(on_disk)} on disk"
        screen.say(text, style="dim")
    if holder is not None:
        screen.say(f"in use by {holder}", style="dim")
    return GOOD


def _cells(row: Row, metrics: list[str]) -> list[str]:
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
        said = [str(manifest.step), age(manifest.time), str(manifest.size), *shown]
    size, shared = bytes_text(row.nbytes), bytes_text(row.shared)
    return [number, said[0], said[1], size, shared, *said[2:], row.state]
