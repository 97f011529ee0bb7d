# SPDX-License-Identifier: Apache-2.0
"""Measure the house: how much code there is, and how far a save and a restore lead.

mpirun -n 2 python -m tests.programs.house

Counts need no idle machine: there is no clock in them.
"""

from __future__ import annotations

import ast
import contextlib
import io
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mpi4py import MPI

import mpi_ckpt
from tests.programs.meetings import training_states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, FrameType

PACKAGE = Path(mpi_ckpt.__file__).parent


@dataclass
class Way:
    """What one call of the manager enters on this rank.

    Attributes:
        functions: The code of each function; comprehensions are part of theirs.
    """

    functions: set[CodeType] = field(default_factory=set)

    @property
    def modules(self) -> set[str]:
        """The files of the package that the functions stand in."""
        return {code.co_filename for code in self.functions}


@contextlib.contextmanager
def walked() -> Iterator[Way]:
    """Note the functions of the package that are entered within the block."""
    way = Way()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        is_ours = code.co_filename.startswith(str(PACKAGE))
        if event == "call" and is_ours and not code.co_name.startswith("<"):
            way.functions.add(code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield way
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def walk(comm: MPI.Intracomm, root: str) -> tuple[Way, Way]:
    """Return what the second save of a training enters, and a restore. Collective."""
    options = mpi_ckpt.Options(preemption_signals=())
    states = training_states()
    with mpi_ckpt.CheckpointManager(root, states, comm=comm, options=options) as manager:
        manager.save()
        with walked() as saving:
            manager.save()
        with walked() as restoring:
            manager.restore()
    return saving, restoring


def kinds_of_lines(text: str) -> Counter[str]:
    """Count the lines of a module: of its head, of docstrings, of comments, of all."""
    tree = ast.parse(text)
    counts = Counter(all=len(text.splitlines()), head=_head(tree, text))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            counts["docstring"] += docstring.end_lineno - docstring.lineno + 1
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    counts["comment"] = len({t.start[0] for t in tokens if t.type == tokenize.COMMENT}) - 1
    return counts


def _head(tree: ast.Module, text: str) -> int:
    """Count the lines before the first of the module's own definitions."""
    for node in tree.body:
        is_head = (
            isinstance(node, (ast.Import, ast.ImportFrom))
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
            or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in _NAMES)
        )
        if not is_head:
            return node.lineno - 1
    return len(text.splitlines())


_NAMES = ("__all__", "logger")


def main() -> None:
    comm = MPI.COMM_WORLD
    with tempfile.TemporaryDirectory() as root:
        saving, restoring = walk(comm, comm.bcast(root))
        comm.barrier()
    if comm.rank > 0:
        return
    for name, way in (("save", saving), ("restore", restoring)):
        print(f"a blocking {name} on root of {comm.size} ranks enters", end=" ")
        print(f"{len(way.modules)} modules, {len(way.functions)} functions")
    lines: Counter[str] = Counter()
    folders: Counter[str] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        lines += kinds_of_lines(path.read_text())
        folders[str(path.parent.relative_to(PACKAGE.parent))] += 1
    total = lines.pop("all")
    shares = ", ".join(f"{kind}s {100 * n / total:.1f} %" for kind, n in lines.items())
    print(f"the package has {total:,} lines: {shares}")
    print(
        "modules by folder:", ", ".join(f"{n} {name}" for name, n in folders.most_common())
    )


if __name__ == "__main__":
    main()
