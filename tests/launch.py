# SPDX-License-Identifier: Apache-2.0
"""Starts MPI jobs for tests, and ends every process of a job that hangs."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import limit

REPOSITORY = Path(__file__).resolve().parent.parent

# What a user's mpirun needs on a machine with fewer cores than ranks, and as root.
_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl": "^ofi",
    "OMPI_MCA_mtl": "^ofi",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONFAULTHANDLER": "1",
}


@dataclass(frozen=True)
class Outcome:
    """How a job ended: code 124 stands for a hang that was cut off."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        return f"exit code {self.code} after {self.seconds:.1f} s\n{self.out}\n{self.err}"


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a job: this process's, less what marks it a rank."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDI_", "MPI_CKPT_"))
    }
    path = os.pathsep.join(filter(None, [str(REPOSITORY), ours.get("PYTHONPATH", "")]))
    own = {"PYTHONPATH": path, "TMPDIR": _scratch()}
    return {**ours, **_ENVIRONMENT, **own, **(extra or {})}


def _scratch() -> str:
    """Return a directory for what a job keeps while it runs; removed at the end of all.

    Open MPI's mpirun names its own there by its process id. One that was killed leaves it
    behind, and a later one of that id does not start.
    """
    made = tempfile.mkdtemp(prefix="job-")
    os.chmod(made, 0o1777)  # some jobs run as another user
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def mpirun_path() -> str:
    """Return the mpirun that belongs to the MPI of this Python environment."""
    beside = Path(sysconfig.get_path("scripts")) / "mpirun"
    return str(beside) if beside.exists() else "mpirun"


def start_job(
    ranks: int,
    command: list[str],
    *,
    env: dict[str, str] | None = None,
    flags: tuple[str, ...] = (),
) -> subprocess.Popen[str]:
    """Start a job in a session of its own; output goes to files, read by `finish_job`."""
    out = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the job)
    err = tempfile.TemporaryFile("w+")  # noqa: SIM115
    job = subprocess.Popen(
        [mpirun_path(), *flags, "-n", str(ranks), sys.executable, *command],
        stdout=out,
        stderr=err,
        stdin=subprocess.DEVNULL,
        env=environment(env),
        start_new_session=True,
        text=True,
    )
    job.streams = (out, err)  # type: ignore[attr-defined]
    return job


def finish_job(job: subprocess.Popen[str], *, timeout: float = 120) -> Outcome:
    """Wait for a job; end all of it if it takes longer than ``timeout`` seconds.

    That is on a machine that is not slow, see `tests.waiting`.
    """
    start = time.monotonic()
    try:
        code = job.wait(limit(timeout))
    except subprocess.TimeoutExpired:
        code = 124
        end_tree(job.pid)
        job.wait()
    texts = []
    for stream in job.streams:  # type: ignore[attr-defined]
        stream.seek(0)
        texts.append(stream.read())
        stream.close()
    return Outcome(code, texts[0], texts[1], time.monotonic() - start)


def run_job(
    ranks: int,
    command: list[str],
    *,
    timeout: float = 120,
    env: dict[str, str] | None = None,
) -> Outcome:
    """Run ``mpirun -n ranks python command...`` to its end."""
    return finish_job(start_job(ranks, command, env=env), timeout=timeout)


def descendants(pid: int) -> list[int]:
    """Return a process's children, their children and so on, itself last."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                stat = (entry / "stat").read_text()
                parent = int(stat.rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []

    def visit(process: int) -> None:
        for child in parents.get(process, []):
            visit(child)
        found.append(process)

    visit(pid)
    return found


def ranks_of(job: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of a job's ranks, in no certain order."""
    ranks = []
    for pid in descendants(job.pid)[:-1]:
        with contextlib.suppress(OSError):
            if "python" in Path(f"/proc/{pid}/comm").read_text():
                ranks.append(pid)
    return ranks


def launchers_of(process: int) -> list[int]:
    """Return a process and those it was started by, as far as they belong to the job."""
    name, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    ours = any(word in name for word in ("mpi", "hydra", "prte"))
    return [process, *launchers_of(int(rest.split()[1]))] if ours else []


def end_tree(pid: int) -> None:
    """Kill a process and all it started: each rank of Open MPI has a group of its own.

    Killed ranks cannot remove their shared memory; it is removed for them.
    """
    processes = descendants(pid)
    shared = {path for process in processes for path in shared_memory(process)}
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for path in shared:
        path.unlink(missing_ok=True)


def shared_memory(pid: int) -> set[Path]:
    """Return the files in /dev/shm that a process has mapped."""
    with contextlib.suppress(OSError):
        maps = Path(f"/proc/{pid}/maps").read_text()
        return {Path(path) for path in re.findall(r" (/dev/shm/\S+)$", maps, re.MULTILINE)}
    return set()
