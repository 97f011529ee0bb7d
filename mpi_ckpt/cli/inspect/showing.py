# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt show``, which shows the contents of one generation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mpi_ckpt.cli.command import (
    GOOD,
    MISUSED,
    CommandError,
    command,
    directory_argument,
    generation_argument,
)
from mpi_ckpt.cli.directory_kinds import directory_to_look_at
from mpi_ckpt.cli.generations import open_wanted
from mpi_ckpt.cli.plain_text import age, bytes_text, iso_date, plural
from mpi_ckpt.cli.tables import Column

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.storage.format.manifest import Manifest, StoredState

_LEAVES_SHOWN = 40
_DIGITS = 12


@command("show", "Show what is in one generation.", dates=True)
@directory_argument()
@generation_argument()
@click.option(
    "--state",
    "names",
    multiple=True,
    metavar="NAME",
    help="Show this state only.",
)
@click.option("--all", "everything", is_flag=True, help="Show all leaves, however many.")
@click.option(
    "--structure", is_flag=True, help="Show the values that are not tensors as well."
)
def show(
    screen: Screen,
    directory: Path,
    generation: str | None,
    names: tuple[str, ...],
    everything: bool,
    structure: bool,
) -> int:
    """Show a generation's states and leaves: dtype, shape, bytes, digest.

    Without GENERATION it is the newest good one. DIR may be a generation's own directory.
    """
    directory = directory_to_look_at(directory, generation, "show")
    with open_wanted(directory, generation) as reader:
        path = reader.path
        manifest = reader.manifest
    states = pick_states(manifest, names)
    screen.data(_document(path, manifest, states, structure=structure))
    _show_head(screen, path, manifest)
    for state in states:
        _show_state(screen, state, limit=None if everything else _LEAVES_SHOWN)
        if structure and not state.is_stream:
            screen.say()
            for line in json.dumps(state.structure, indent=2).splitlines():
                screen.say(f"  {line}")
    return GOOD


def pick_states(manifest: Manifest, names: tuple[str, ...]) -> list[StoredState]:
    """Return the states of these names, or all if none is given.

    Raises:
        CommandError: If there is no such name; the message lists the names there are.
    """
    there = [state.name for state in manifest.states]
    for name in names:
        if name not in there:
            raise CommandError(
                f"generation {manifest.generation} has no state {name!r}; there: "
                + (", ".join(map(repr, there)) or "none"),
                code=MISUSED,
                kind="absent",
            )
    return [state for state in manifest.states if not names or state.name in names]


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape for people, such as ``512 x 64``."""
    return " x ".join(map(str, shape)) if shape else "scalar"


def _show_head(screen: Screen, path: Path, manifest: Manifest) -> None:
    saved = iso_date(manifest.time)
    if not screen.iso:
        date, clock = saved.rstrip("Z").split("T")
        saved = f"{date} {clock} UTC, {age(manifest.time)} ago"
    shared = [f for f in manifest.files if f.generation != manifest.generation]
    total = sum(file.nbytes for file in manifest.files)
    files = f"{plural(len(manifest.files), 'file')}, {bytes_text(total)}"
    if shared:
        older = bytes_text(sum(file.nbytes for file in shared))
        files += f", of which {older} from older generations"
    facts = [
        ("generation", manifest.generation),
        ("path", path),
        ("step", manifest.step),
        ("saved", saved),
        ("by", f"job {manifest.job}, {plural(manifest.size, 'rank')}"),
        ("files", files),
    ]
    facts += [(f"metric {name}", f"{v:.6g}") for name, v in manifest.metrics.items()]
    screen.facts(facts)


def _show_state(screen: Screen, state: StoredState, limit: int | None) -> None:
    screen.say()
    total = bytes_text(state.nbytes)
    if state.is_stream:
        digest = state.leaves[0].digest.whole.hex()[:_DIGITS]
        screen.say(f"{state.name}: a stream of {total}, digest {digest}", style="bold")
        return
    if not state.leaves:
        screen.say(f"{state.name}: plain values, no leaves", style="bold")
        return
    screen.say(f"{state.name}: {plural(len(state.leaves), 'leaf')}, {total}", style="bold")
    screen.table(
        [
            Column("leaf", names=True),
            Column("dtype", spare=2),
            Column("shape", spare=1),
            Column("bytes", right=True, spare=3),
            Column("digest", spare=4),
        ],
        [
            [
                leaf.spec.name,
                leaf.spec.dtype,
                shape_text(leaf.spec.shape),
                bytes_text(leaf.extent.nbytes),
                leaf.digest.whole.hex()[:_DIGITS],
            ]
            for leaf in state.leaves[:limit]
        ],
        indent=2,
    )
    hidden = len(state.leaves) - len(state.leaves[:limit])
    if hidden:
        screen.say(f"  ... and {hidden} more: --all shows them", style="dim")


def _document(
    path: Path, manifest: Manifest, states: list[StoredState], *, structure: bool
) -> dict[str, Any]:
    return {
        "path": str(path),
        "generation": manifest.generation,
        "step": manifest.step,
        "time": manifest.time,
        "saved": iso_date(manifest.time),
        "job": manifest.job,
        "ranks": manifest.size,
        "metrics": dict(manifest.metrics),
        "files": [
            {"name": file.name, "bytes": file.nbytes, "generation": file.generation}
            for file in manifest.files
        ],
        "states": [_state_document(state, structure=structure) for state in states],
    }


def _state_document(state: StoredState, *, structure: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": state.name,
        "bytes": state.nbytes,
    }
    if state.is_stream:
        return {**document, "stream": state.leaves[0].digest.whole.hex()}
    if structure:
        document["structure"] = state.structure
    document["leaves"] = [
        {
            "name": leaf.spec.name,
            "dtype": leaf.spec.dtype,
            "shape": list(leaf.spec.shape),
            "bytes": leaf.extent.nbytes,
            "digest": leaf.digest.whole.hex(),
            "file": leaf.extent.file,
        }
        for leaf in state.leaves
    ]
    return document
