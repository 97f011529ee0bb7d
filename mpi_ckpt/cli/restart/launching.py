# SPDX-License-Identifier: Apache-2.0
"""Builds the commands that start ranks, or a rescue, on given hosts with each launcher."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.cli.command import MISUSED, CommandError
from mpi_ckpt.cli.doctor.machine import ask, family_of, which
from mpi_ckpt.storage.notes import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


_VERSION_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Host:
    """A host and its number of ranks."""

    name: str
    slots: int = 1


@dataclass(frozen=True, slots=True)
class Launcher:
    """A launcher of the site.

    Attributes:
        words: The program, by its full path, and the user's options.
        family: ``Open MPI``, ``MPICH`` or ``srun``.
    """

    words: tuple[str, ...]
    family: str


def find_launcher(given: str | None, environ: Mapping[str, str]) -> Launcher:
    """Find the requested launcher, or else mpirun, or else srun.

    Raises:
        CommandError: If there is none, or its family is unknown.
    """
    try:
        words = shlex.split(given) if given is not None else []
    except ValueError as error:
        raise CommandError(f"--launcher {given!r}: {error}", code=MISUSED) from None
    if given is not None and not words:
        raise CommandError("--launcher is empty", code=MISUSED, kind="usage")
    for name in words[:1] or ["mpirun", "srun"]:
        path = Path(name) if "/" in name else which(name, environ)
        if path is not None and path.is_file():
            words = [str(path), *words[1:]]
            return Launcher(tuple(words), _family(path, environ))
    wanted = words[0] if words else "neither mpirun nor srun"
    raise CommandError(
        f"{wanted} is not in PATH; activate the environment of your MPI, or name the "
        "launcher: --launcher '/path/to/mpirun --its-options'",
        code=MISUSED,
        kind="absent",
    )


def _family(path: Path, environ: Mapping[str, str]) -> str:
    if path.name == "srun":
        return "srun"
    said, ended = ask([str(path), "--version"], environ, _VERSION_SECONDS)
    family = family_of(said)
    if family not in _FLAGS:
        raise CommandError(
            f"{path} is no launcher of Open MPI, MPICH or Slurm "
            f"(`--version` {ended}: {said.strip()[:100]!r})",
            code=MISUSED,
            kind="usage",
        )
    return family


def place(hosts: Sequence[Host], wanted: int, least: int) -> tuple[int, tuple[Host, ...]]:
    """Choose how many ranks to start, and the first hosts with enough slots. Pure.

    Returns:
        The number, 0 if there are too few slots for the least; and the hosts.
    """
    size, used = 0, []
    for host in hosts:
        if size < wanted:
            used.append(host)
            size += host.slots
    if size < least:
        return 0, ()
    return min(size, wanted), tuple(used)


def launch_command(
    launcher: Launcher, size: int, hosts: Sequence[Host], program: Sequence[str]
) -> list[str]:
    """Return the command that starts a job. Pure.

    Args:
        launcher: The launcher.
        size: Number of ranks.
        hosts: The hosts; empty to let the launcher choose.
        program: The program of every rank.
    """
    return [*launcher.words, *_FLAGS[launcher.family](size, hosts), *program]


def _open_mpi(size: int, hosts: Sequence[Host]) -> list[str]:
    where = ",".join(f"{host.name}:{host.slots}" for host in hosts)
    # mpirun passes only named variables to other hosts.
    return ["-x", VARIABLE, "-n", str(size), *(["--host", where] if where else [])]


def _mpich(size: int, hosts: Sequence[Host]) -> list[str]:
    where = ",".join(f"{host.name}:{host.slots}" for host in hosts)
    return ["-n", str(size), *(["-hosts", where] if where else [])]


def _srun(size: int, hosts: Sequence[Host]) -> list[str]:
    # Otherwise the ranks of a step wait for a dead rank.
    flags = ["--kill-on-bad-exit=1", f"--ntasks={size}"]
    if hosts:
        names = ",".join(host.name for host in hosts)
        flags += [f"--nodes={len(hosts)}", f"--nodelist={names}"]
    return flags


_FLAGS = {"Open MPI": _open_mpi, "MPICH": _mpich, "srun": _srun}


@dataclass(frozen=True, slots=True)
class Salvage:
    """What is to be copied from hosts.

    Attributes:
        local: The path that the program gives to `Local`.
        directory: Its checkpoint directory.
    """

    local: str
    directory: Path


def salvage_command(
    launcher: Launcher, size: int, hosts: Sequence[str], salvage: Salvage
) -> list[str]:
    """Return the command that copies, with one process on each host if they are known.

    Args:
        launcher: The launcher.
        size: How many ranks the job had.
        hosts: Names of the hosts; empty if the launcher finds them.
        salvage: What is to be copied.
    """
    words = ("rescue", salvage.local, str(salvage.directory))
    program = [sys.executable, "-m", "mpi_ckpt", *words]
    places = [Host(name) for name in hosts]
    return launch_command(launcher, len(places) or size, places, program)


def left_behind(
    last: Sequence[str], there: Collection[str], chosen: Collection[str]
) -> bool:
    """Return whether hosts of the last attempt are there, and not in the next one.

    Args:
        last: The hosts of the last attempt.
        there: The hosts that can be used.
        chosen: Those of the next attempt.
    """
    return any(name in there and name not in chosen for name in last)
