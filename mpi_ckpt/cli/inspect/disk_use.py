# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt du``: what takes the space of a directory, and of its states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt.cli.command import GOOD, command, directory_argument, generation_argument
from mpi_ckpt.cli.directory_kinds import directory_of_all
from mpi_ckpt.cli.generations import bytes_on_disk, look, open_wanted
from mpi_ckpt.cli.plain_text import bytes_text, plural
from mpi_ckpt.cli.tables import Column

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpi_ckpt.cli.generations import Row
    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.storage.format.manifest import StoredState


@dataclass(frozen=True, slots=True)
class _Use:
    """Bytes of something: those that others share by hard link, and its own."""

    name: str
    shared: int
    own: int

    def to_json(self) -> dict[str, Any]:
        total = self.shared + self.own
        return {"name": self.name, "bytes": total, "shared": self.shared, "own": self.own}

    def cells(self) -> list[str]:
        return [
            self.name,
            *map(bytes_text, (self.shared + self.own, self.shared, self.own)),
        ]


@command("du", "Show what takes the space, by state and by generation.")
@directory_argument()
@generation_argument()
def disk_use(screen: Screen, directory: Path, generation: str | None) -> int:
    """Show what takes space in DIR: the states of GENERATION, then all generations.

    Without GENERATION it is the newest. "shared" is in files that other generations have as
    well, by hard link; "own" is freed when the generation goes.
    """
    directory = directory_of_all(directory, "du")
    with open_wanted(directory, generation) as reader:
        manifest, path = reader.manifest, reader.path
    linked = {
        file.name: _links(path / file.name) > 1 for file in manifest.files
    }  # of a file that is gone: none
    states = [_use_of_state(state, linked) for state in manifest.states]
    rows = [row for row in look(directory) if row.state != "gone"]
    generations = [_Use(row.name, row.nbytes - own, own) for row, own in _owned(rows)]
    on_disk = bytes_on_disk(rows)
    screen.data(
        {
            "generation": manifest.generation,
            "states": [use.to_json() for use in states],
            "generations": [use.to_json() for use in generations],
            "bytes_on_disk": on_disk,
        }
    )
    sizes = [Column(name, right=True) for name in ("size", "shared", "own")]
    screen.table(
        [Column(f"state of generation {manifest.generation}", names=True), *sizes],
        [use.cells() for use in sorted(states, key=lambda use: -use.own - use.shared)],
    )
    screen.say()
    screen.table(
        [Column("folder", names=True), *sizes], [use.cells() for use in generations]
    )
    apart = sum(row.nbytes for row in rows)
    screen.say(
        f"{bytes_text(on_disk)} on disk for {plural(len(rows), 'folder')}; "
        f"{bytes_text(apart)} if nothing were shared",
        style="dim",
    )
    return GOOD


def _use_of_state(state: StoredState, linked: dict[str, bool]) -> _Use:
    shared = sum(leaf.extent.nbytes for leaf in state.leaves if linked[leaf.extent.file])
    cut = sum(leaf.spec.nbytes for leaf in state.cut)
    if state.files and all(linked[name] for name in state.files):
        shared += cut  # of which files has a tile which size is in their headers only
    return _Use(state.name, shared, state.nbytes - shared)


def _owned(rows: Sequence[Row]) -> list[tuple[Row, int]]:
    """Return for each directory the bytes of its files that no other has."""
    users: dict[tuple[int, int, int], int] = {}
    for row in rows:
        for inode in row.inodes:
            users[inode] = users.get(inode, 0) + 1
    return [
        (row, sum(inode[2] for inode in row.inodes if users[inode] == 1)) for row in rows
    ]


def _links(path: Path) -> int:
    try:
        return path.lstat().st_nlink
    except OSError:
        return 0
