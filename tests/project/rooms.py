# SPDX-License-Identifier: Apache-2.0
"""The picture of the rooms in ARCHITECTURE.md, made from the imports of the package.

python -m tests.project.rooms            # prints it
python -m tests.project.rooms --write    # puts it into ARCHITECTURE.md
"""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "mpi_ckpt"
DOCUMENT = REPOSITORY / "ARCHITECTURE.md"
BEGIN, END = "```mermaid\n", "```\n"

_DOORS = ("manager", "loading", "checkpoint", "state")
_GROUND = "plain values"
"""The room of the single modules at the bottom, which all others may import."""


def room_of(module: str) -> str:
    """Return the room that a module of the package is in."""
    parts = module.split(".")[1:]
    if not parts or parts[0].startswith("__"):
        return ""
    if (PACKAGE / parts[0]).is_dir():
        is_divided = len(parts) > 1 and (PACKAGE / parts[0] / parts[1]).is_dir()
        return "/".join(parts[: 1 + is_divided])
    return parts[0] if parts[0] in _DOORS else _GROUND


@functools.cache
def arrows() -> set[tuple[str, str]]:
    """Return which room imports which when the program runs, but what others imply."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        here = room_of(module.removesuffix(".__init__"))
        for target in imported(ast.parse(path.read_text())):
            there = room_of(target)
            if here and there not in ("", here):
                found.setdefault(here, set()).add(there)
    return {(a, b) for a in found for b in found[a] if not _is_implied(found, a, b)}


def imported(tree: ast.Module) -> set[str]:
    """Return the modules of the package that a module imports, but for its types."""
    types_only = type_checking_only(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in types_only and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in names if is_module(name)} or {node.module}
    return {name for name in found if name.startswith("mpi_ckpt")}


@functools.cache
def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    """Return the nodes that no running program reaches."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }


def is_module(name: str) -> bool:
    """Return whether a dotted name is that of a module."""
    path = REPOSITORY.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def _is_implied(found: dict[str, set[str]], start: str, goal: str) -> bool:
    """Return whether a way of two arrows or more leads from a room down to another.

    Rooms that import one another are on one floor: no way leads through them.
    """
    between = {
        room
        for room in _below(found, start)
        if goal in _below(found, room)
        and start not in _below(found, room)
        and room not in _below(found, goal)
    }
    return bool(between)


def _below(found: dict[str, set[str]], start: str) -> set[str]:
    ahead, seen = [*found.get(start, ())], set()
    while ahead:
        room = ahead.pop()
        if room not in seen:
            seen.add(room)
            ahead += found.get(room, ())
    return seen


def picture() -> str:
    """Return the rooms and the arrows between them, as text that GitHub draws."""
    below: dict[str, list[str]] = {}
    for above, room in sorted(arrows()):
        below.setdefault(above, []).append(room)
    rooms = sorted({room for arrow in arrows() for room in arrow})
    labels = [f'    {_id(room)}["{room}"]' for room in rooms if _id(room) != room]
    lines = [f"    {_id(a)} --> {' & '.join(map(_id, below[a]))}" for a in below]
    return "\n".join(["flowchart TD", *labels, *lines, ""])


def _id(room: str) -> str:
    return room.replace("/", "_").replace(" ", "_")


def shown() -> str:
    """Return the picture that stands in the document."""
    return DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        print(picture(), end="")
        return
    before, begin, rest = DOCUMENT.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    DOCUMENT.write_text(before + begin + picture() + end + after)


if __name__ == "__main__":
    main()
