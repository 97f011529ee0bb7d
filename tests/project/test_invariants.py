# SPDX-License-Identifier: Apache-2.0
"""What the package promises by absence (ARCHITECTURE.md), read from its source."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mpi_ckpt
from mpi_ckpt import comm
from tests.project.rooms import type_checking_only

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(mpi_ckpt.__file__).parent
MODULES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}


@functools.cache
def nodes_of(tree: ast.Module) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree))


def where(accepts, *, besides: tuple[str, ...] = ()) -> list[str]:
    """Return module:line of every node that a function accepts, but in some modules."""
    return [
        f"{name}:{node.lineno}"
        for name, tree in MODULES.items()
        if not name.startswith(besides or ("//",))
        for node in nodes_of(tree)
        if accepts(node)
    ]


@functools.cache
def called(node: ast.AST) -> str:
    """Return the dotted name of what a call calls, empty for anything else."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Give line and name of every module that a running program imports."""
    ignored = type_checking_only(tree)
    for node in nodes_of(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""


def importers(*packages: str, besides: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{name}:{line}"
        for name, tree in MODULES.items()
        if not name.startswith(besides or ("//",))
        for line, module in imports(tree)
        if module.split(".")[0] in packages
    ]


CHANGES = re.compile(
    r"(os|shutil|path|[a-z_]*path|source|target|self\._?path)"
    r"\.(rename|renames|replace|link|symlink|symlink_to|hardlink_to|unlink|remove|rmdir"
    r"|removedirs|mkdir|makedirs|fsync|fdatasync|sync|truncate|ftruncate|pwrite|pwritev"
    r"|write_bytes|write_text|touch|chmod|rmtree|move|copy|copyfile|copytree|mkfifo|mknod"
    r"|posix_fallocate)"
)


def test_one_module_changes_the_file_system():
    changes = where(
        lambda node: CHANGES.fullmatch(called(node)),
        besides=("storage/filesystem.py", "storage/owning/lock.py"),
    )
    # The length of memory, which no file has.
    assert [place.partition(":")[0] for place in changes] == ["memory.py"]
    assert where(lambda node: called(node) == "os.rename") != []


def test_lock_changes_nothing_but_its_own_file():
    tree = MODULES["storage/owning/lock.py"]
    used = {called(n) for n in nodes_of(tree) if re.fullmatch(r"os\.\w+", called(n))}
    assert used == {
        "os.open", "os.close", "os.fstat", "os.fsync", "os.ftruncate", "os.pread",
        "os.posix_fadvise", "os.pwrite", "os.getpid", "os.register_at_fork",
    }  # fmt: skip


def test_files_are_opened_in_two_modules_only():
    opened = where(
        lambda node: called(node) in ("open", "os.open", "io.open", "path.open"),
        besides=("storage/filesystem.py", "storage/owning/lock.py"),
    )
    # Memory of another process of the job, which no file has.
    assert [place.partition(":")[0] for place in opened] == ["memory.py"]
    assert importers("shutil", "tempfile") == []


def test_fsync_is_called_in_three_functions():
    # Of a file, of a directory, and of the lock file.
    assert len(where(lambda node: called(node) in ("os.fsync", "os.fdatasync"))) == 3


def test_only_comm_knows_mpi():
    assert importers("mpi4py", besides=("comm/",)) == []
    assert importers("mpi4py") != []
    assert importers("horovod", besides=("integrations/horovod/",)) == []
    for name, tree in MODULES.items():
        names = {node.attr for node in nodes_of(tree) if isinstance(node, ast.Attribute)}
        if not name.startswith("comm/"):
            assert not names & {"COMM_WORLD", "COMM_SELF", "Abort", "Finalize", "Init"}, (
                name
            )


def test_world_is_only_duplicated_divided_asked_left_and_aborted():
    lines = [
        ast.unparse(node)
        for name, tree in MODULES.items()
        for node in nodes_of(tree)
        if isinstance(node, ast.Attribute) and "COMM_WORLD." in ast.unparse(node)
    ]
    assert set(lines) == {
        "mpi.COMM_WORLD.Create_group", "mpi.COMM_WORLD.Get_group", "mpi.COMM_WORLD.rank",
        "mpi.COMM_WORLD.size", "mpi.COMM_WORLD.Abort",
        # When one of several members has failed, and at the end of the program.
        "self._mpi.COMM_WORLD.Ibarrier", "self._mpi.COMM_WORLD.Isend",
        "mpi.COMM_WORLD.Iprobe", "mpi.COMM_WORLD.Recv",
    }  # fmt: skip


def test_the_command_line_is_imported_by_nobody_else_and_needs_no_mpi():
    others = [name for name in MODULES if not name.startswith(("cli/", "__main__"))]
    users = [n for n in others for _, m in imports(MODULES[n]) if "mpi_ckpt.cli" in m]
    assert users == []
    assert importers("click", "rich", besides=("cli/",)) == []
    needed = {m for n in MODULES if n.startswith("cli/") for _, m in imports(MODULES[n])}
    banned = ("comm", "elastic", "manager", "checkpoint")
    assert {
        m for m in needed if m.startswith("mpi_ckpt.") and m.split(".")[1] in banned
    } == (set())


def test_importing_mpi_is_left_to_a_function():
    for name, tree in MODULES.items():
        top = ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef)], [])
        in_functions = {
            inner
            for node in ast.walk(top)
            if isinstance(node, ast.FunctionDef)
            for inner in ast.walk(node)
        }
        for node in ast.walk(top):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in in_functions:
                assert "mpi4py" not in ast.unparse(node) or node in type_checking_only(
                    tree
                ), name


def test_torch_is_imported_by_states_only_and_late_but_for_tensors():
    users = ("states/", "integrations/", "cli/convert/torchfile.py")
    assert importers("torch", besides=users) == []
    for name, tree in MODULES.items():
        top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        if name not in (
            "states/kept_leaves.py",
            "states/tensors.py",
            "states/buffers/tensor_bytes.py",
            "states/buffers/device_bytes.py",
            "states/buffers/fingerprint.py",
        ):
            assert not any("torch" in ast.unparse(node) for node in top), name


def test_pickle_is_used_by_one_state_only_and_between_ranks():
    unsafe = ("pickle", "dill", "cloudpickle", "shelve", "marshal")
    between_ranks = "integrations/horovod/packing.py"
    assert importers(*unsafe, besides=("states/nested.py", between_ranks)) == []
    # What comes from a rank of the same job, and from no file.
    found = {module for _, module in imports(MODULES[between_ranks])}
    assert not any(module.startswith("mpi_ckpt") for module in found)
    assert (
        where(lambda node: called(node) in ("eval", "exec", "compile", "__import__")) == []
    )
    allow = [
        keyword
        for tree in MODULES.values()
        for node in nodes_of(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "allow_pickle"
    ]
    assert allow == []


def test_nothing_forks_or_starts_processes():
    starters = ("multiprocessing", "subprocess", "pty", "popen2")
    # The doctor asks MPI in a process of its own, and the restart loop starts launchers; no
    # training imports those modules.
    assert (
        importers(*starters, besides=("cli/doctor/machine.py", "cli/restart/child.py"))
        == []
    )
    assert (
        where(
            lambda node: re.fullmatch(
                r"os\.(fork|forkpty|spawn\w*|system|popen|exec\w*|posix_spawn\w*)",
                called(node),
            )
        )
        == []
    )


def test_threads_are_started_where_no_mpi_is():
    starters = where(
        lambda node: (
            called(node)
            in ("ThreadPoolExecutor", "threading.Thread", "threading.Timer", "Thread")
        )
    )
    modules = {place.partition(":")[0] for place in starters}
    assert modules == {
        "comm/ulfm/guard.py", "leaves/digest.py",
        "engine/save/background.py", "engine/watchdog.py",
        "storage/filesystem.py", "storage/owning/lock.py",
        "storage/reading/read_queue.py", "storage/writing/outfile.py",
    }  # fmt: skip
    for name in modules:
        imported = {module for _, module in imports(MODULES[name])}
        assert not any("mpi_ckpt.comm" in module for module in imported), name


def test_collectives_are_not_called_by_root_alone():
    """Look for a call of a collective below ``if ... is_root`` or in an except clause."""
    collectives = {*COLLECTIVES, "comm.all_reduce"}

    def guarded(node: ast.AST) -> bool:
        if isinstance(node, ast.If) and "is_root" in ast.unparse(node.test):
            bodies = [*node.body, *node.orelse]
        elif isinstance(node, ast.ExceptHandler):
            bodies = node.body
        else:
            return False
        return any(called(n) in collectives for body in bodies for n in ast.walk(body))

    # Here every rank calls it, with a source or a target of its own.
    assert {place.partition(":")[0] for place in where(guarded)} <= {
        "engine/sync/sending.py"
    }


def test_signal_handler_sets_a_flag_and_steps_aside():
    (handler,) = (
        node
        for node in ast.walk(MODULES["elastic/preemption.py"])
        if isinstance(node, ast.FunctionDef) and node.name == "_note"
    )
    assert {called(node) for node in ast.walk(handler)} - {""} == {
        "self._previous.get", "os.getpid", "self._as_if_absent", "self._note_in_child",
        "signal.Signals", "callable", "previous", "suppress", "os.write",
    }  # fmt: skip
    installed = where(lambda node: called(node) == "signal.signal")
    # The restart loop is no part of a training: its handlers only count.
    assert {place.partition(":")[0] for place in installed} == {
        "elastic/preemption.py", "cli/restart/looping.py",
    }  # fmt: skip


def test_hook_for_what_nobody_catches_is_set_in_one_module():
    touched = where(
        lambda node: (
            isinstance(node, ast.Attribute)
            and ast.unparse(node) in ("sys.excepthook", "threading.excepthook")
            and isinstance(node.ctx, ast.Store)
        )
    )
    assert {place.partition(":")[0] for place in touched} == {"engine/abort.py"}


def test_logging_is_never_configured():
    touched = where(
        lambda node: re.search(
            r"basicConfig|addHandler|setLevel|dictConfig|captureWarnings|(?<!finger)print$",
            called(node),
        ),
        besides=("cli/screen.py",),  # the one module that prints
    )
    assert touched == []
    printed = [called(n) for n in nodes_of(MODULES["cli/screen.py"])]
    assert [call for call in printed if call.endswith("print")] == ["console.print"]
    for name, tree in MODULES.items():
        for node in nodes_of(tree):
            if called(node) == "logging.getLogger":
                assert ast.unparse(node) == "logging.getLogger(__name__)", name


def test_modules_are_small():
    lengths = {
        path.relative_to(PACKAGE): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {str(name): n for name, n in lengths.items() if n > 600} == {}
    # A module is one whole thought: most are not far from the limit, nor far below it.
    assert sorted(lengths.values())[len(lengths) // 2] <= 250


def code_lines(function: ast.FunctionDef) -> int:
    """Count the lines of a body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_functions_and_classes_are_small():
    for name, tree in MODULES.items():
        for node in nodes_of(tree):
            if isinstance(node, ast.FunctionDef):
                assert code_lines(node) <= 50, f"{name}: {node.name}"
            elif isinstance(node, ast.ClassDef):
                methods = [
                    member.name
                    for member in node.body
                    if isinstance(member, ast.FunctionDef)
                    and not member.name.startswith("_")
                    and not any(ast.unparse(d) == "property" for d in member.decorator_list)
                ]
                assert len(methods) <= 12, f"{name}: {node.name}: {methods}"


def test_todo_notes_are_not_left_behind():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text), path
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path


def public(tree: ast.Module) -> Iterator[tuple[list[ast.AST], ast.AST]]:
    """Give every public class and function with what encloses it, the module first."""

    def visit(node: ast.AST, outer: list[ast.AST]):
        for member in node.body:
            if not isinstance(member, (ast.FunctionDef, ast.ClassDef)):
                continue
            if member.name.startswith("_"):
                continue
            yield outer, member
            if isinstance(member, ast.ClassDef):
                yield from visit(member, [*outer, member])

    yield from visit(tree, [tree])


def test_everything_public_is_documented():
    missing = [
        f"{name}: {member.name}"
        for name, tree in MODULES.items()
        for _, member in public(tree)
        if not ast.get_docstring(member)
    ]
    assert missing == []
    assert all(ast.get_docstring(tree) for tree in MODULES.values())


# One of these is said of every function: by itself, its class or its module.
WHO_CALLS = re.compile(
    r"\b([Cc]ollective|[Rr]oot only|[Rr]oot alone|on root only|[Cc]alled (on|by) root"
    r"|[Cc]alled on every rank|Pure|[Nn]o MPI)\b"
)
COLLECTIVES = {
    name
    for name in comm.__all__
    if re.search(r"^\s*Collective\b", getattr(comm, name).__doc__ or "", re.MULTILINE)
    and inspect.isfunction(getattr(comm, name))
} - {"join"}  # which much else is called

NEAR_MPI = (
    "comm/",
    "engine/",
    "elastic/",
    "storage/",
    "integrations/",
    "states/",
    "state.py",
    "manager.py",
    "checkpoint.py",
    "integrations/horovod/",
)


def test_every_function_near_mpi_says_which_ranks_call_it():
    silent = [
        f"{name}: {member.name}"
        for name, tree in MODULES.items()
        if name.startswith(NEAR_MPI)
        for outer, member in public(tree)
        if isinstance(member, ast.FunctionDef)
        and not any(ast.unparse(d) == "property" for d in member.decorator_list)
        and not any(WHO_CALLS.search(ast.get_docstring(n) or "") for n in [*outer, member])
    ]
    assert silent == []


def test_functions_that_use_collectives_say_collective():
    """A caller of `agree` and the like that calls itself anything else would mislead."""
    for name, tree in MODULES.items():
        for outer, member in public(tree):
            if not isinstance(member, ast.FunctionDef):
                continue
            calls = {called(node) for node in ast.walk(member)}
            if calls & COLLECTIVES:
                said = " ".join(ast.get_docstring(n) or "" for n in [*outer, member])
                assert re.search(r"\bCollective\b", said), f"{name}: {member.name}"


@pytest.mark.parametrize("name", ["storage", "comm"])
def test_lower_layers_import_no_upper_ones(name):
    upper = ("engine", "manager", "checkpoint", "states", "elastic", "state")
    upper += ({"storage": "comm", "comm": "storage"}[name],)
    for module, tree in MODULES.items():
        if module.startswith(f"{name}/"):
            for line, imported in imports(tree):
                layer = imported.removeprefix("mpi_ckpt.").split(".")[0]
                assert layer not in upper, f"{module}:{line}"


def test_no_module_and_no_class_is_called_as_another():
    """A name that is met twice sends its reader to the wrong file."""
    modules = Counter(
        Path(name).stem
        for name in MODULES
        if Path(name).stem not in ("__init__", "__main__")
    )
    classes = Counter(
        node.name.lstrip("_")
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in (modules + classes).items() if count > 1] == []
