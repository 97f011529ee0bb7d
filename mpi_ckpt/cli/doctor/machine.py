# SPDX-License-Identifier: Apache-2.0
"""Checks software, MPI and launcher of this machine.

A separate process with a time limit loads MPI; this one never does.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi_ckpt.cli.doctor.checks import Check

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_software, _mpi, _launcher = (
    partial(Check, area) for area in ("software", "MPI", "launcher")
)

_MPI_SECONDS = 30.0
_MPIRUN_SECONDS = 10.0

# Variables by which a launcher tells a process its place in a job. The probe is a separate
# job, so it must not see them; but it must see the user's settings (OMPI_MCA_*).
_PLACE_IN_JOB = re.compile(
    r"OMPI_(?!MCA_|ALLOW_)|PMI|PMIX|PRTE_(?!MCA_)|HYDI?_|MPI_LOCAL|MV2_COMM|SLURM_"
)
# Launcher -> its variables for size and rank.
_LAUNCHERS = (
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPICH's mpirun", "PMI_SIZE", "PMI_RANK"),
    ("MVAPICH's mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("Horovod", "HOROVOD_SIZE", "HOROVOD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def check_software() -> list[Check]:
    """Check Python and the packages that this one needs."""
    return [
        _software("python", f"{platform.python_version()}, {sys.executable}"),
        *(_package(name, needed=True) for name in ("mpi_ckpt", "numpy", "xxhash")),
        _package("torch", needed=False),
    ]


def check_mpi(environ: Mapping[str, str]) -> list[Check]:
    """Check mpi4py, the MPI library that it loads, thread level, and the mpirun in PATH."""
    kept = {k: v for k, v in environ.items() if not _PLACE_IN_JOB.match(k)}
    lines, ended = ask([sys.executable, "-m", "mpi_ckpt.comm.probe"], kept, _MPI_SECONDS)
    found: dict[str, Any] = {}
    for line in lines.splitlines():
        with suppress(ValueError):
            found |= json.loads(line)
    checks = []
    if "mpi4py" in found:
        checks.append(_mpi("mpi4py", found["mpi4py"]))
    if "error" in found:
        checks.append(
            _mpi(
                "library",
                "cannot be loaded",
                "wrong",
                f"{found['error']}; jobs cannot start, but this command line works without "
                "it",
            )
        )
        return checks
    if "library" in found:
        name = " ".join(str(found["library"]).partition(",")[0].split())
        text = f"{name}, MPI {found['standard']}"
        checks.append(_mpi("library", text))
    checks.append(_thread_level(found, ended))
    checks.append(_mpirun(found, environ))
    return checks


def check_launcher(environ: Mapping[str, str]) -> list[Check]:
    """Check the variables that launchers set."""
    checks = []
    for launcher, size_name, rank_name in _LAUNCHERS:
        size = environ.get(size_name, "")
        if size.isdecimal():
            rank = environ.get(rank_name, "?")
            text = f"rank {rank} of {size} ({size_name})"
            checks.append(_launcher(launcher, text))
    sizes = {check.found.split()[3] for check in checks}
    if len(sizes) > 1:
        checks.append(
            _launcher(
                "agreement",
                "launchers name different sizes",
                "note",
                "one was started within the other: the inner one counts",
            )
        )
    if not checks:
        checks.append(
            _launcher(
                "variables",
                "none: not started by a launcher",
                advice="a job is started with mpirun, srun or horovodrun",
            )
        )
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_NUM_TASKS" not in environ:
        checks.append(
            _launcher(
                "Slurm",
                f"in job {environ['SLURM_JOB_ID']}, outside of srun",
                "note",
                "srun needs --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH",
            )
        )
    return checks


def family_of(text: str) -> str | None:
    """Return the MPI of a version text: ``Open MPI``, ``MPICH`` or ``Intel MPI``."""
    for pattern, family in (
        (r"open.?mpi|open mpi|prterun|prrte", "Open MPI"),
        (r"intel", "Intel MPI"),
        (r"mpich|hydra|mvapich|cray", "MPICH"),
    ):
        if re.search(pattern, text, re.IGNORECASE):
            return family
    return None


def _package(name: str, *, needed: bool) -> Check:
    try:
        return _software(name, version(name))
    except PackageNotFoundError:
        if not needed:
            return _software(name, "not installed", "ok", "only torch states need it")
        advice = f"pip install {name}"
        return _software(name, "not installed", "wrong", advice)


def _thread_level(found: Mapping[str, Any], ended: str) -> Check:
    if "thread_level" not in found:
        return _mpi(
            "start",
            ended,
            "wrong",
            "MPI does not start here; see what `python -m mpi_ckpt.comm.probe` says",
        )
    level = found["thread_level"]
    if found["funneled"]:
        return _mpi("thread level", level, advice="FUNNELED is all that is needed")
    return _mpi(
        "thread level",
        level,
        "wrong",
        "asynchronous saves use threads beside MPI: FUNNELED is needed",
    )


def _mpirun(found: Mapping[str, Any], environ: Mapping[str, str]) -> Check:
    path = which("mpirun", environ)
    if path is None:
        return _mpi(
            "mpirun",
            "not in PATH",
            "note",
            "jobs need the mpirun of the library above, or srun",
        )
    said, _ = ask([str(path), "--version"], environ, _MPIRUN_SECONDS)
    theirs, ours = family_of(said), family_of(str(found.get("library", "")))
    first = (re.search(r"\d+\.\d+[.\w]*", said) or [""])[0]
    text = f"{path}, {theirs or 'of an unknown MPI'} {first}".rstrip()
    if theirs is None or ours is None:
        return _mpi("mpirun", text, "note", "make sure that it fits the library")
    if theirs != ours:
        return _mpi(
            "mpirun",
            text,
            "wrong",
            f"mpi4py loads {ours}: each rank would be a job of its own (and be refused); "
            f"put {ours}'s mpirun first in PATH",
        )
    return _mpi("mpirun", text, advice="fits the library that mpi4py loads")


def which(name: str, environ: Mapping[str, str]) -> Path | None:
    """Return the path of a program: in PATH, or beside this Python."""
    for directory in environ.get("PATH", os.defpath).split(os.pathsep):
        path = Path(directory or ".") / name
        if path.is_file() and os.access(path, os.X_OK):
            return path
    # For a virtual environment that is used without activation.
    beside = Path(sys.executable).parent / name
    return beside if beside.is_file() else None


def ask(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    seconds: float,
    *,
    joined: bool = True,
) -> tuple[str, str]:
    """Run a program; return its output and its end. Its children have ended too.

    Args:
        arguments: The program, and its arguments.
        environ: Its environment.
        seconds: Its time.
        joined: Whether its standard error is output as well; else it is this one's.
    """
    try:
        process = subprocess.Popen(
            arguments,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if joined else None,
            start_new_session=True,
        )
    except OSError as error:
        return "", f"cannot be run: {error}"
    with process:
        try:
            output, _ = process.communicate(timeout=seconds)
            ended = f"ended with code {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"hung for {seconds:.0f} s"
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    return output.decode(errors="replace"), ended
