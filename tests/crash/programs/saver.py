# SPDX-License-Identifier: Apache-2.0
"""Restores, then saves step after step, to be killed while it does.

Arguments: a directory for everything, number of saves (0: for ever), "cut" if there is
state that is cut over the ranks.
MPI_CKPT_TEST_KILL: ``change N MOMENT WHOM``: before, inside or after root's Nth change of
the file system a rank, ``all`` or ``mpirun`` is killed; ``collective N MOMENT WHOM``: the
same before, inside or after the Nth part in a collective of that rank, or else of root;
unset, or a rank that the job does not have: nobody.

In the directory: ``ckpt`` the checkpoints; ``pids`` of the ranks; ``restored`` what each
job found; ``acked`` the steps whose save returned; ``changes`` and ``collectives`` how many
root has counted; ``shared`` files of shared memory to be removed; ``problem`` what should
not be.
"""

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path

from mpi4py import MPI

from mpi_ckpt import IO
from tests.crash.faults import Untouched, quiet
from tests.crash.moments import Changes, Collectives, Moment
from tests.crash.recorder import in_place_of_os
from tests.crash.world import Saved, Training
from tests.launch import shared_memory


def note(path: Path, line: object) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


def last_line(path: Path) -> int:
    """Return the last number of a file; 0 if it is missing or empty."""
    lines = path.read_text().split() if path.exists() else []
    return int(lines[-1]) if lines else 0


def stand_ins(directory: Path, comm) -> tuple[Changes, Collectives]:
    """Return what kills the rank that is to be killed, at the moment when it is."""
    asked = os.environ.get("MPI_CKPT_TEST_KILL", "nothing 0 never 0")
    kind, number, when, whom = asked.split()
    pids = comm.allgather(os.getpid())
    if comm.rank == 0:
        (directory / "pids").write_text(" ".join(map(str, pids)))

    def kill() -> None:
        for pid in victims(whom, pids):
            os.kill(pid, signal.SIGKILL)

    def moment(of: str, rank: str) -> Moment:
        return Moment(int(number) if kind == of and rank == str(comm.rank) else 0, when)

    # Root changes most files: its changes say when, whoever is killed.
    changes = Changes(moment("change", "0"), kill)
    own = whom if whom.isdecimal() else "0"
    return changes, Collectives(moment("collective", own), kill)


def victims(whom: str, pids: list[int]) -> list[int]:
    """Return the processes to kill: a rank, all, or mpirun; who kills comes last."""
    if whom == "mpirun":
        return [os.getsid(0)]  # `start_job` has given it a session of its own
    chosen = [pid for rank, pid in enumerate(pids) if whom in ("all", str(rank))]
    return sorted(chosen, key=lambda pid: pid == os.getpid())


def run(directory: Path, saves: int, comm, *, cut: bool) -> None:
    changes, collectives = stand_ins(directory, comm)
    is_root = comm.rank == 0
    for path in shared_memory(os.getpid()):  # MPI's, which a killed rank cannot remove
        note(directory / "shared", path)
    acked = comm.bcast(last_line(directory / "acked") if is_root else None)
    options = {
        "keep": 2,
        "comm": collectives.watch(comm),
        "cut": cut,
        "deadline_seconds": 50,
        "asynchronous": acked % 2 == 1,  # now and then, the same on every rank
        "overlap": acked % 4 == 3,
        "writers": "all" if acked % 5 > 2 else "root",
        "io": IO(reuse=acked % 3 > 0, readers="all" if acked % 7 > 3 else "root"),
    }
    may_touch = is_root or cut or "all" in (options["writers"], options["io"].readers)
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_place_of_os(changes if may_touch else Untouched()))
        stack.enter_context(collectives)
        training = stack.enter_context(Training(directory / "ckpt", **options))
        save_on(directory, training, saves, acked)
    if is_root:
        note(directory / "changes", changes.count)
        note(directory / "collectives", collectives.count)


def save_on(directory: Path, training: Training, saves: int, acked: int) -> None:
    """Restore, then save step after step; note what was acknowledged."""
    is_root = training.manager.is_root
    found = training.restore()
    step = 0 if found is None else found.step
    if step < acked or found not in (None, Saved.of(step)):
        raise AssertionError(f"{found} came back, step {acked} was acknowledged")
    if is_root:
        note(directory / "restored", f"{step} {MPI.COMM_WORLD.size}")
    done = 0
    while saves == 0 or done < saves:
        step += 1
        done += 1
        if is_root or step % 3:
            training.move(step)  # if not, the sync sends what root has
        elif training.tiles is not None:
            training.tiles.move(step)  # what only this rank has
        pending = training.manager.save(step)
        training.move(step + 100)  # what is to be saved does not change any more
        pending.wait()
        if is_root:
            note(directory / "acked", step)


def main() -> None:
    directory, comm = Path(sys.argv[1]), MPI.COMM_WORLD
    try:
        with quiet():
            run(directory, int(sys.argv[2]), comm, cut="cut" in sys.argv[3:])
    except BaseException:
        note(directory / "problem", f"rank {comm.rank}: {traceback.format_exc()}")
        raise


if __name__ == "__main__":
    main()
