# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt diff``, which compares two generations."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpi_ckpt.cli.command import BAD, GOOD, MISUSED, command, misused
from mpi_ckpt.cli.directory_kinds import (
    directory_of_all,
    directory_to_look_at,
    kind_of,
)
from mpi_ckpt.cli.generations import find_generation, open_generation
from mpi_ckpt.cli.inspect.changes import compare_generations, structure_changes
from mpi_ckpt.cli.inspect.showing import shape_text
from mpi_ckpt.cli.plain_text import bytes_text, plural
from mpi_ckpt.cli.tables import Column

if TYPE_CHECKING:
    from mpi_ckpt.cli.inspect.changes import LeafChange
    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.storage.format.manifest import Manifest

_VALUES_SHOWN = 20
_VALUE_CHARACTERS = 30

_COLUMNS = (
    Column("leaf", names=True),
    Column("", states=True),
    Column("dtype", spare=5),
    Column("shape", spare=4),
    Column("differing", right=True, spare=1),
    Column("max abs", right=True, spare=2),
    Column("max rel", right=True, spare=3),
)

_Values = dict[str, list[tuple[str, Any, Any]]]


@command("diff", "Compare two generations.", trouble=MISUSED)
@click.argument("where", metavar="[DIR] A B", nargs=-1, required=True)
@click.option(
    "--all", "everything", is_flag=True, help="Also show the leaves that are equal."
)
def diff(screen: Screen, where: tuple[str, ...], everything: bool) -> int:
    """Compare two generations leaf by leaf.

    A and B are generations of DIR, or, without it, directories of generations. Leaves are
    equal if their digests are; of others the largest absolute difference is shown, and the
    largest one relative to the larger of the two numbers.

    Exit codes as of diff(1): 0 nothing differs, 1 something does, 2 trouble.
    """
    first, second = _places(where)
    with ExitStack() as stack:
        left = stack.enter_context(open_generation(first))
        right = stack.enter_context(open_generation(second))
        total = left.manifest.nbytes
        with screen.progress("comparing", total) as done:
            changes = compare_generations(left, right, done)
        values = _values(left.manifest, right.manifest)
    counts = Counter(change.change for change in changes)
    same = counts["equal"] == len(changes) and not values
    kinds = ("equal", "changed", "added", "removed")
    screen.data(
        {
            "left": str(first),
            "right": str(second),
            "same": same,
            **{kind: counts[kind] for kind in kinds},
            "leaves": [
                change.to_json()
                for change in changes
                if everything or change.change != "equal"
            ],
            "values": [
                {"state": state, "path": path, "left": a, "right": b}
                for state, found in values.items()
                for path, a, b in found
            ],
        }
    )
    _show(screen, changes, values, everything=everything)
    equal = sum(change.left_bytes for change in changes if change.change == "equal")
    screen.say(
        f"{plural(counts['equal'], 'leaf')} equal ({bytes_text(equal)}), "
        + ", ".join(f"{counts[kind]} {kind}" for kind in kinds[1:])
        + f"; {plural(sum(map(len, values.values())), 'plain value')} changed",
        style="bold green" if same else "bold",
    )
    return GOOD if same else BAD


def _places(where: tuple[str, ...]) -> tuple[Path, Path]:
    if "" in where:
        text = "one of the arguments is empty: was a variable not set?"
        raise misused(text)
    if len(where) == 3:
        root = directory_of_all(Path(where[0]), "diff DIR A B")
        return find_generation(root, where[1]), find_generation(root, where[2])
    if len(where) == 2:
        return _own_directory(where[0]), _own_directory(where[1])
    raise misused(
        f"diff takes DIR A B, or two directories of generations; {len(where)} given"
    )


def _own_directory(name: str) -> Path:
    path = directory_to_look_at(Path(name), None, "diff")
    if kind_of(path) != "generation":
        raise misused(
            f"{name} is not the directory of a generation; to compare two of one "
            "directory: mpi-ckpt diff DIR A B"
        )
    return path


def _values(left: Manifest, right: Manifest) -> _Values:
    found: _Values = {}
    sides = [{state.name: state for state in side.states} for side in (left, right)]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        mine, other = sides[0].get(name), sides[1].get(name)
        changes = structure_changes(
            mine.structure if mine else None, other.structure if other else None
        )
        if changes:
            found[name] = changes
    return found


def _show(
    screen: Screen, changes: list[LeafChange], values: _Values, *, everything: bool
) -> None:
    shown = [change for change in changes if everything or change.change != "equal"]
    for state in dict.fromkeys([*(change.state for change in shown), *values]):
        inside = [change for change in changes if change.state == state]
        differing = sum(change.change != "equal" for change in inside)
        count = f": {differing} of {plural(len(inside), 'leaf')} changed"
        screen.say(state + (count if inside else ""), style="bold")
        screen.table(
            _COLUMNS,
            [_cells(change) for change in shown if change.state == state],
            indent=2,
        )
        found = values.get(state, [])
        for path, a, b in found[:_VALUES_SHOWN]:
            screen.say(f"  {path or 'value'}: {_short(a)} -> {_short(b)}")
        if len(found) > _VALUES_SHOWN:
            hidden = len(found) - _VALUES_SHOWN
            screen.say(f"  ... and {plural(hidden, 'value')} more", style="dim")
        screen.say()


def _cells(change: LeafChange) -> list[str]:
    spec, other = change.left or change.right, change.right or change.left
    if spec is None or other is None:
        sizes = f"{bytes_text(change.left_bytes)} -> {bytes_text(change.right_bytes)}"
        return [change.leaf, change.change, "", sizes, "", "", ""]
    dtype, shape = spec.dtype, shape_text(spec.shape)
    if other.dtype != dtype:
        dtype = f"{dtype} -> {other.dtype}"
    if other.shape != spec.shape:
        shape = f"{shape} -> {shape_text(other.shape)}"
    cells = [change.leaf, change.change, dtype, shape]
    far = change.difference
    if far is None:
        return [*cells, "", "", ""]
    share = 100 * far.differing / max(1, math.prod(spec.shape))
    differing = f"{share:.3g} %"
    if far.not_finite:
        differing += f", {far.not_finite} not finite"
    return [*cells, differing, f"{far.max_abs:.3g}", f"{far.max_rel:.3g}"]


def _short(value: object) -> str:
    text = repr(value)
    if len(text) <= _VALUE_CHARACTERS:
        return text
    return text[: _VALUE_CHARACTERS - 3] + "..."
