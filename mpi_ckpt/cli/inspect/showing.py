# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt show``, which shows the contents of one generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpi_ckpt.cli.command import (
    GOOD,
    command,
    directory_argument,
    generation_argument,
    misused,
)
from mpi_ckpt.cli.directory_kinds import directory_to_look_at
from mpi_ckpt.cli.generations import open_wanted
from mpi_ckpt.cli.inspect.tile_maps import (
    TILES_SHOWN,
    map_leaves,
    paint_map,
    pick_leaves,
    show_map,
)
from mpi_ckpt.cli.plain_text import ago, bytes_text, iso_date, plural
from mpi_ckpt.cli.tables import Column

if TYPE_CHECKING:
    from mpi_ckpt.cli.inspect.tile_maps import TileMap
    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.storage.format.manifest import Manifest, StoredState
    from mpi_ckpt.storage.reading.tile_index import LeafKey

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
@click.option(
    "--leaf",
    "leaf",
    metavar="NAME",
    help="Show how this leaf is cut over the ranks.",
)
@click.option(
    "--png",
    "png",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="With --leaf: write the picture to this file, which must not exist.",
)
def show(
    screen: Screen,
    directory: Path,
    generation: str | None,
    names: tuple[str, ...],
    everything: bool,
    structure: bool,
    leaf: str | None,
    png: Path | None,
) -> int:
    """Show a generation's states and leaves: dtype, shape, bytes, digest.

    Without GENERATION it is the newest good one. DIR may be a generation's own directory.
    An array that was cut over the ranks has tiles in several files; --leaf draws them.
    """
    directory = directory_to_look_at(directory, generation, "show")
    with open_wanted(directory, generation) as reader:
        path = reader.path
        manifest = reader.manifest
        states = pick_states(manifest, names)
        maps = map_leaves(reader, states)
    if leaf is not None:
        maps = pick_leaves(maps, leaf)
    if png is not None:
        _paint(maps, leaf, png)
    kept = {one.key: one for one in maps}
    documents = [
        _state_document(state, kept, structure=structure, tiles=leaf is not None)
        for state in states
    ]
    screen.data(_document(path, manifest, documents))
    _show_head(screen, path, manifest)
    if leaf is not None:
        for one in maps:
            show_map(screen, one, limit=None if everything else TILES_SHOWN)
        return GOOD
    for state in states:
        _show_state(screen, state, kept, limit=None if everything else _LEAVES_SHOWN)
        if structure and not state.is_stream:
            screen.say()
            for line in json.dumps(state.structure, indent=2).splitlines():
                screen.say(f"  {line}")
    return GOOD


def _paint(maps: list[TileMap], leaf: str | None, png: Path) -> None:
    if leaf is None or len(maps) != 1:
        raise misused(
            "--png shows one leaf: give --leaf NAME, and the state with it "
            "(--leaf STATE/NAME) if several states have such a leaf"
        )
    paint_map(maps[0], png)


def pick_states(manifest: Manifest, names: tuple[str, ...]) -> list[StoredState]:
    """Return the states of these names, or all if none is given.

    Raises:
        CommandError: If there is no such name; the message lists the names there are.
    """
    there = [state.name for state in manifest.states]
    for name in names:
        if name not in there:
            raise misused(
                f"generation {manifest.generation} has no state {name!r}; there: "
                + (", ".join(map(repr, there)) or "none"),
                "absent",
            )
    return [state for state in manifest.states if not names or state.name in names]


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape for people, such as ``512 x 64``."""
    return " x ".join(map(str, shape)) if shape else "scalar"


def _show_head(screen: Screen, path: Path, manifest: Manifest) -> None:
    saved = iso_date(manifest.time)
    if not screen.iso:
        date, clock = saved.rstrip("Z").split("T")
        saved = f"{date} {clock} UTC, {ago(manifest.time)}"
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


def _show_state(
    screen: Screen, state: StoredState, maps: dict[LeafKey, TileMap], limit: int | None
) -> None:
    screen.say()
    total = bytes_text(state.nbytes)
    if state.is_stream:
        digest = state.leaves[0].digest.whole.hex()[:_DIGITS]
        screen.say(f"{state.name}: a stream of {total}, digest {digest}", style="bold")
        return
    count = len(state.leaves) + len(state.cut)
    if not count:
        screen.say(f"{state.name}: plain values, no leaves", style="bold")
        return
    cut = f", {len(state.cut)} of them cut over ranks" if state.cut else ""
    screen.say(f"{state.name}: {plural(count, 'leaf')}{cut}, {total}", style="bold")
    columns = [
        Column("leaf", names=True),
        Column("dtype", spare=2),
        Column("shape", spare=1),
        Column("bytes", right=True, spare=3),
        Column("digest", spare=4),
    ]
    if state.cut:
        columns += [
            Column("tiles", right=True, spare=5),
            Column("files", right=True, spare=6),
        ]
    rows = [
        [*_form_cells(leaf.spec), leaf.digest.whole.hex()[:_DIGITS], "", ""]
        for leaf in state.leaves
    ]
    for leaf in state.cut:
        files = maps[state.name, leaf.spec.name].files
        rows.append([*_form_cells(leaf.spec), "", leaf.tiles, len(files)])
    screen.table(columns, [row[: len(columns)] for row in rows[:limit]], indent=2)
    hidden = count - len(rows[:limit])
    if hidden:
        screen.say(f"  ... and {hidden} more: --all shows them", style="dim")


def _form_cells(spec: LeafSpec) -> list[object]:
    return [spec.name, spec.dtype, shape_text(spec.shape), bytes_text(spec.nbytes)]


def _document(
    path: Path, manifest: Manifest, states: list[dict[str, Any]]
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
        "states": states,
    }


def _state_document(
    state: StoredState, maps: dict[LeafKey, TileMap], *, structure: bool, tiles: bool
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": state.name,
        "bytes": state.nbytes,
    }
    if state.is_stream:
        return {**document, "stream": state.leaves[0].digest.whole.hex()}
    if structure:
        document["structure"] = state.structure
    leaves = [
        _leaf_document(leaf.spec, leaf.digest.whole.hex(), leaf.extent.file)
        for leaf in state.leaves
    ]
    # A cut leaf has no digest: each of its tiles has.
    leaves += [_leaf_document(leaf.spec, None, None) for leaf in state.cut]
    cut = {leaf.spec.name for leaf in state.cut}
    for leaf in leaves:
        one = maps.get((state.name, leaf["name"]))
        if one is not None and leaf["name"] in cut:
            leaf |= {"tiles": len(one.array.tiles), "files": list(one.files)}
        if one is not None and tiles:
            leaf["boxes"] = one.to_json()
    document["leaves"] = [one for one in leaves if (state.name, one["name"]) in maps]
    return document


def _leaf_document(spec: LeafSpec, digest: str | None, file: str | None) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "bytes": spec.nbytes,
        "digest": digest,
        "file": file,
    }
