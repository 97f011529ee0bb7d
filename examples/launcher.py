# SPDX-License-Identifier: Apache-2.0
"""Starts mpirun, finds its ranks among the processes of this machine, ends them all."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

__all__ = ["Job", "mpi_name"]

REPOSITORY = Path(__file__).resolve().parent.parent

# More ranks than cores, waiting ranks that yield their core, no search for fabrics:
# sensible for a demonstration on one machine. What the user has set stays.
_DEFAULTS = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl": "^ofi",
    "OMPI_MCA_mtl": "^ofi",
    "OMP_NUM_THREADS": "1",
}
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
_RANK = re.compile(rb"(?:^|\0)(?:OMPI_COMM_WORLD_RANK|PMI_RANK)=(\d+)")


class Job:
    """``mpirun -n ranks python command...``, in the background.

    Args:
        ranks: Number of ranks.
        command: Program and arguments.
        output: File that gets what the job prints.
    """

    def __init__(self, ranks: int, command: list[str], output: Path) -> None:
        self.output = output
        # MPI's own files; a killed job leaves them behind.
        self._scratch = tempfile.TemporaryDirectory(prefix="mpi-")
        with output.open("ab") as file:
            self._mpirun = subprocess.Popen(
                [_mpirun(), "-n", str(ranks), sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**_environment(), "TMPDIR": self._scratch.name},
                start_new_session=True,  # Ctrl-C is for the demonstration, not the job
            )
        atexit.register(self._leave_nothing_running)

    def _leave_nothing_running(self) -> None:
        if self.is_running:
            self.kill()

    @property
    def is_running(self) -> bool:
        """Whether mpirun has not ended yet."""
        return self._mpirun.poll() is None

    def wait(self, seconds: float) -> int:
        """Return the exit code of mpirun; end the job if it takes longer."""
        try:
            code = self._mpirun.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._scratch.cleanup()
        return code

    def ranks(self) -> dict[int, int]:
        """Return the process of each rank, told by what its launcher has set."""
        processes = {}
        for process in _descendants(self._mpirun.pid):
            # A process may be gone, or be another user's.
            with contextlib.suppress(OSError):
                found = _RANK.search(Path(f"/proc/{process}/environ").read_bytes())
                if found and process != self._mpirun.pid:
                    processes.setdefault(int(found[1]), process)
        return processes

    def stop(self) -> None:
        """Stop all ranks where they are, between two system calls."""
        stopped = list(self.ranks().values())
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
        while not all(_is_stopped(process) for process in stopped):
            time.sleep(0.001)

    def resume(self) -> None:
        """Let stopped ranks go on."""
        for process in self.ranks().values():
            os.kill(process, signal.SIGCONT)

    def kill(self) -> int:
        """Kill every process of the job at once, as a power cut would."""
        processes = _descendants(self._mpirun.pid)
        shared = {path for process in processes for path in _shared_memory(process)}
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        code = self._mpirun.wait()
        # A power cut would have cleared this as well.
        for path in shared:
            path.unlink(missing_ok=True)
        self._scratch.cleanup()
        return code


def mpi_name() -> str:
    """Return the MPI that mpi4py loads here: ``Open MPI 5.0.11`` or so."""
    program = "from mpi4py import MPI; n, v = MPI.get_vendor(); print(n, *v)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=_environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    name, version = re.fullmatch(r"(.*?) ([\d ]+)", done.stdout.strip()).groups()
    return f"{name} {version.replace(' ', '.')}"


def _mpirun() -> str:
    # The one beside python belongs to the MPI that was installed with it.
    beside = Path(sysconfig.get_path("scripts")) / "mpirun"
    return str(beside) if beside.exists() else "mpirun"


def _environment() -> dict[str, str]:
    environment = {**_DEFAULTS, **(_AS_ROOT if os.geteuid() == 0 else {}), **os.environ}
    # Works from a clone, too, where the package is not installed.
    paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def _descendants(process: int) -> list[int]:
    """Return a process and all it started, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(
                    int(entry.name)
                )
    found = [process]
    for member in found:  # grows on the way
        found += children.get(member, [])
    return found


def _shared_memory(process: int) -> list[Path]:
    """Return the files of shared memory that a process has mapped."""
    with contextlib.suppress(OSError):
        maps = Path(f"/proc/{process}/maps").read_text()
        return [
            Path(found) for found in re.findall(r" (/dev/shm/\S+)$", maps, re.MULTILINE)
        ]
    return []


def _is_stopped(process: int) -> bool:
    with contextlib.suppress(OSError):
        return _stat(process)[0] in "TtZ"
    return True


def _stat(process: int) -> list[str]:
    """Return state, parent and so on: what follows the name, which may hold spaces."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
