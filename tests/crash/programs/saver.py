# SPDX-License-Identifier: Apache-2.0
"""Restores, then saves step after step, to be killed while it does.

Arguments: a directory for everything, number of saves (0: for ever).
MPI_CKPT_TEST_KILL: ``N before RANK`` or ``N after RANK``: before or after root's Nth change
of the file system, that rank is killed; unset: nobody.

In the directory: ``ckpt`` the checkpoints; ``restored`` what each job found; ``acked`` the
steps whose save returned; ``changes`` how many changes root has counted; ``shared`` files
of shared memory to be removed; ``problem`` what should not be.
"""

import itertools
import os
import signal
import sys
import traceback
from pathlib import Path

from mpi4py import MPI

from tests.crash.faults import Untouched, quiet
from tests.crash.recorder import in_place_of_os
from tests.crash.world import Saved, Training
from tests.launch import shared_memory

CHANGES = (
    "mkdir",
    "pwrite",
    "posix_fallocate",
    "ftruncate",
    "fsync",
    "rename",
    "link",
    "unlink",
    "rmdir",
)


class Killer:
    """An ``os`` that counts changes and kills a process at one of them."""

    def __init__(self, number: int, moment: str, pid: int) -> None:
        self.changes = 0
        self._numbers = itertools.count(1)  # right from several threads
        self._at = (number, moment)
        self._pid = pid

    def __getattr__(self, name):
        function = getattr(os, name)
        return self._counted(function) if name in CHANGES else function

    def open(self, path, flags, mode=0o777):
        if flags & os.O_CREAT:
            return self._counted(os.open)(path, flags, mode)
        return os.open(path, flags, mode)

    def _counted(self, function):
        def call(*args, **kwargs):
            number = next(self._numbers)
            self.changes = max(number, self.changes)
            self._kill_if(number, "before")
            result = function(*args, **kwargs)
            self._kill_if(number, "after")
            return result

        return call

    def _kill_if(self, *moment):
        if moment == self._at:
            os.kill(self._pid, signal.SIGKILL)


def note(path: Path, line: object) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


def last_line(path: Path) -> int:
    """Return the last number of a file; 0 if it is missing or empty."""
    lines = path.read_text().split() if path.exists() else []
    return int(lines[-1]) if lines else 0


def run(directory: Path, saves: int, comm) -> None:
    number, moment, victim = os.environ.get("MPI_CKPT_TEST_KILL", "0 never 0").split()
    pids = comm.allgather(os.getpid())
    is_root = comm.rank == 0
    for path in shared_memory(os.getpid()):  # MPI's, which a killed rank cannot remove
        note(directory / "shared", path)
    acked = comm.bcast(last_line(directory / "acked") if is_root else None)
    options = {
        "keep": 2,
        "comm": comm,
        "deadline_seconds": 30,
        "asynchronous": acked % 2 == 1,  # now and then, the same on every rank
        "reuse": acked % 3 > 0,
        "writers": "all" if acked % 5 > 2 else "root",
    }
    others = os if options["writers"] == "all" else Untouched()
    stand_in = Killer(int(number), moment, pids[int(victim)]) if is_root else others
    with in_place_of_os(stand_in), Training(directory / "ckpt", **options) as training:
        found = training.restore()
        step = 0 if found is None else found.step
        if step < acked or found not in (None, Saved.of(step)):
            raise AssertionError(f"{found} came back, step {acked} was acknowledged")
        if is_root:
            note(directory / "restored", f"{step} {comm.size}")
        done = 0
        while saves == 0 or done < saves:
            step += 1
            done += 1
            training.move(step)
            training.manager.save(step).wait()
            if is_root:
                note(directory / "acked", step)
    if is_root:
        note(directory / "changes", stand_in.changes)


def main() -> None:
    directory, comm = Path(sys.argv[1]), MPI.COMM_WORLD
    try:
        with quiet():
            run(directory, int(sys.argv[2]), comm)
    except BaseException:
        note(directory / "problem", f"rank {comm.rank}: {traceback.format_exc()}")
        raise


if __name__ == "__main__":
    main()
