# SPDX-License-Identifier: Apache-2.0
"""Kills ranks, launchers or whole jobs, and removes what they cannot remove any more."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.launch import descendants, end_tree, finish_job, ranks_of
from tests.waiting import wait_for

if TYPE_CHECKING:
    import random
    import subprocess
    from collections.abc import Collection, Iterable, Iterator

    from tests.launch import Outcome


@contextlib.contextmanager
def own_sessions() -> Iterator[dict[str, str]]:
    """Give the environment of jobs that are killed; remove what they leave after.

    A killed mpirun leaves its session under its process id. The next with that id would
    find it and give up, so sessions are kept apart from those of other jobs.
    """
    # A short path: sockets are made there.
    with tempfile.TemporaryDirectory(prefix="ck", ignore_cleanup_errors=True) as sessions:
        yield {"TMPDIR": sessions}


def remove_shared_memory(directory: Path) -> None:
    """Remove the shared memory that killed ranks had noted in a directory."""
    noted = directory / "shared"
    for path in set(noted.read_text().split()) if noted.exists() else ():
        Path(path).unlink(missing_ok=True)


def fail_on_problem(directory: Path) -> None:
    """Require that no rank found anything wrong."""
    problem = directory / "problem"
    assert not problem.exists(), problem.read_text()


def forget_survivors(directory: Path) -> None:
    """Forget what ranks may rightly say of a job in which somebody was killed.

    Those that start while mpirun dies find themselves alone, and refuse to save. Those that
    talk to a rank that dies may be told so by MPI, before they are ended as well.
    """
    problem = directory / "problem"
    told = problem.read_text() if problem.exists() else ""
    entries = re.split(r"^rank \d+: (?=Traceback)", told, flags=re.MULTILINE)[1:]
    rightly = r"errors\.LaunchError: |errors\.CollectiveError: .* MPI failed: "
    if all(re.search(rightly, entry) for entry in entries):
        problem.unlink(missing_ok=True)


def thread_states(pid: int) -> set[str]:
    """Return in which states the threads of a process are, as letters of the kernel's."""
    states = set()
    with contextlib.suppress(OSError):  # it has ended, or one since they were listed
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
                states.add(stat.rpartition(")")[2].split()[0])
    return states


def alive(pids: Iterable[int]) -> list[int]:
    """Return which of some processes have not ended, with all their threads.

    One inside an fsync ends only after it, and holds until then what it has locked.
    """
    return [pid for pid in pids if thread_states(pid) - {"Z", "X"}]


def wait_for_death(pids: Collection[int]) -> None:
    """Return when some processes have ended; fail if they do not.

    Who is inside an fsync ends only after it, and a successor would wait for it.
    """
    assert wait_for(lambda: not alive(pids), 60), f"{alive(pids)} live on"


def kill(pids: Iterable[int]) -> None:
    """Kill processes that may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def everybody_of(job: subprocess.Popen[str]) -> tuple[list[int], list[int]]:
    """Stop a job's mpirun, so that nobody can be added; return all processes, and ranks."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.pid, signal.SIGSTOP)
    return descendants(job.pid), ranks_of(job)


def kill_some(job: subprocess.Popen[str], rng: random.Random, running: list[int]) -> str:
    """Kill all ranks of a stopped job, one of them, or mpirun; say whom."""
    victims = [("mpirun", [job.pid])]
    if running:
        victims += [("all ranks", running), ("a rank", [rng.choice(running)])]
    whom, pids = rng.choice(victims)
    kill(pids)
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.pid, signal.SIGCONT)
    return whom


def end_job(job: subprocess.Popen[str], everybody: list[int]) -> Outcome:
    """End what is left of a job: ranks of a dead mpirun are nobody's descendants."""
    end_tree(job.pid)
    kill(alive(everybody))
    outcome = finish_job(job)
    wait_for_death(everybody)
    return outcome
