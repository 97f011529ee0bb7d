# SPDX-License-Identifier: Apache-2.0
"""Saves many times under hardship, and tells what is lost, left behind or grown.

``mpirun -n 4 python -m tests.crash.programs.soak DIRECTORY --saves 1000``: each fsync is
slowed, one save in twenty meets a fault on one of its writers, and every few saves another
manager takes over, which saves in another way. Prints what came of it as JSON; exit code 1
if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpi_ckpt import (
    IO,
    ArrayState,
    Block,
    CheckpointManager,
    ConcatState,
    KeepLast,
    ObjectState,
    Options,
    ShardedArrayState,
)
from mpi_ckpt.errors import SaveError
from mpi_ckpt.storage.format.layout import generation_number, is_partial_name
from tests.crash.faults import CALLS, ERRNOS, Fault, Faulty, quiet
from tests.crash.recorder import in_place_of_os

WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"writers": "all", "io": IO(readers="all")},
    {"asynchronous": True},
    {"asynchronous": True, "writers": "all"},
)
EVERY = 20  # one save in so many meets a fault
KEEP = 3
WARM_UP = 8  # turns: every way twice, so that memory kept for reuse is there
# Of the saves. Until then the lists of MPI and of the allocator grow, half a MiB at a time.
# In 3,000 saves of 600 managers a rank took 0.6 KiB more with each manager.
SETTLING = 0.5

# Calls that every save makes, so that a fault does happen.
SURE = [call for call in CALLS if call not in ("preadv", "link", "ftruncate", "statvfs")]


class Hardship:
    """An ``os`` with a slow fsync, of which a call fails when asked to.

    Attributes:
        spared: How many generations are there that an earlier manager could not retire.
        most: The most generations, whole and partial, that were there at any fsync,
            without those.
        fired: How many faults did happen.
    """

    def __init__(self, root: Path, delay_seconds: float) -> None:
        self._root = root
        self._delay_seconds = delay_seconds
        self._faulty: Faulty | None = None
        self.spared = 0
        self.most = 0
        self.fired = 0

    def __getattr__(self, name: str) -> Any:
        if self._faulty is not None:
            return getattr(self._faulty, name)
        return self._slowly if name == "fsync" else getattr(os, name)

    def arm(self, fault: Fault) -> None:
        self._faulty = Faulty(fault, _Slow(self._slowly))

    def disarm(self) -> bool:
        """Tell whether the fault did happen."""
        faulty, self._faulty = self._faulty, None
        if faulty is None:
            return False
        assert not faulty.retried, faulty.retried
        faulty.close_kept()
        self.fired += faulty.fired
        return faulty.fired > 0

    def _slowly(self, descriptor: int) -> None:
        there = len(generations(self._root, partial=True))
        self.most = max(self.most, there - self.spared)
        time.sleep(self._delay_seconds)
        os.fsync(descriptor)


class _Slow:
    def __init__(self, fsync: Any) -> None:
        self.fsync = fsync

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class Counted(MPI.Intracomm):
    """A communicator that counts duplicates that were made and not freed."""

    open = 0

    def Idup(self, info=None):
        Counted.open += 1
        made, request = super().Idup()
        return Counted(made), request

    def Free(self):
        Counted.open -= 1
        super().Free()


def generations(root: Path, *, partial: bool = False) -> list[str]:
    names = os.listdir(root) if root.is_dir() else []
    return [
        name
        for name in names
        if generation_number(name) is not None or (partial and is_partial_name(name))
    ]


class Contents:
    """What is saved: 16 MiB of numbers that all change from step to step."""

    def __init__(self, nbytes: int) -> None:
        count = nbytes // 4 // 8
        self._base = np.arange(count)
        self._found = np.empty(count, np.int64)
        self.arrays = {name: np.zeros(count, np.int64) for name in "abcd"}
        self.count = ObjectState("count", 0)
        self.states = [ArrayState("arrays", self.arrays), self.count]

    def move(self, step: int) -> None:
        for array in self.arrays.values():
            np.add(self._base, step, out=array)
        self.count.value = step

    def holds(self, step: int) -> bool:
        for array in self.arrays.values():
            np.subtract(array, self._base, out=self._found)
            if self._found.min() != step or self._found.max() != step:
                return False
        return self.count.value == step


class CutContents(Contents):
    """The same beside a fifth array, of which each rank has a part, and numbered rows."""

    def __init__(self, nbytes: int, comm: MPI.Intracomm) -> None:
        super().__init__(nbytes)
        count = len(self._base)
        self._rank, self._size = comm.rank, comm.size
        self._mine = self._base[slice(*self._share(count))].copy()
        first = self._share(count)[0]
        block = Block(self._mine, shape=(count,), offset=(first,))
        self._rows = ConcatState("rows", self._rows_at(0))
        self.states += [ShardedArrayState("field", {"x": block}), self._rows]

    def move(self, step: int) -> None:
        super().move(step)
        np.add(self._base[slice(*self._share(len(self._base)))], step, out=self._mine)
        self._rows.arrays = self._rows_at(step)

    def holds(self, step: int) -> bool:
        own = self._base[slice(*self._share(len(self._base)))]
        return (
            super().holds(step)
            and bool((self._mine == own + step).all())
            and all(
                np.array_equal(self._rows.arrays[name], column)
                for name, column in self._rows_at(step).items()
            )
        )

    def _share(self, count: int) -> tuple[int, int]:
        return count * self._rank // self._size, count * (self._rank + 1) // self._size

    def _rows_at(self, step: int) -> dict[str, Any]:
        first, end = self._share(1000 + step % 5)
        return {"number": np.arange(first, end), "step": np.full(end - first, step)}


class Soak:
    """One run; the same on every rank."""

    def __init__(self, root: Path, given: argparse.Namespace, comm: MPI.Intracomm) -> None:
        self.root = root
        self.given = given
        self.comm = Counted(comm)
        self.rng = random.Random(given.seed)
        nbytes = given.mib << 20
        self.contents = CutContents(nbytes, comm) if given.cut else Contents(nbytes)
        self.hardship = Hardship(root, given.delay)
        self.acked = 0
        self.seconds: list[float] = []
        self.resident: list[int] = []
        self.wrong: list[str] = []
        self.failed: Counter[str] = Counter()
        self.armed: Fault | None = None
        self.victim = 0
        self.faults = 0
        self.faulty = False
        self.open: list[tuple[int, int]] = []

    def run(self) -> None:
        step = 0
        for turn in range(-(-self.given.saves // self.given.turn)):
            options = WAYS[turn % len(WAYS)]
            with self._manager(options) as manager:
                self._restore(manager)
                for _ in range(min(self.given.turn, self.given.saves - step)):
                    step += 1
                    self._save(manager, step, options)
            self._note_open()
        with self._manager({}) as manager:
            self._restore(manager)
            # Clean up what the last fault has left.
            self.contents.move(step + 1)
            manager.save(step + 1)
        if self.comm.rank == 0 and len(generations(self.root, partial=True)) > KEEP:
            self.wrong.append(f"left behind: {os.listdir(self.root)}")

    def _manager(self, options: dict[str, Any]) -> CheckpointManager:
        plain = Options(
            retention=KeepLast(KEEP),
            preemption_signals=(),
            deadline_seconds=120,
            **options,
        )
        return CheckpointManager(
            self.root, self.contents.states, comm=self.comm, options=plain
        )

    def _restore(self, manager: CheckpointManager) -> None:
        """The last acknowledged save is back, or the run goes no further."""
        self.contents.move(-1)
        report = manager.restore()
        found = report.step if report else 0
        if found != self.acked or (report and not self.contents.holds(found)):
            self.wrong.append(f"step {found} came back, {self.acked} was acknowledged")
        # One manager makes up for a fault before its next save; another does not know.
        self.hardship.spared = int(self.faulty)

    def _save(self, manager: CheckpointManager, step: int, options: dict[str, Any]) -> None:
        self._prepare(step, options)
        self.contents.move(step)
        start = time.perf_counter()
        try:
            manager.save(step).wait()
        except SaveError as error:
            self.failed[type(error).__name__] += 1
            if self.armed is None:
                self.wrong.append(f"step {step} failed without a fault: {error}")
        else:
            self.acked = step
            if self.armed is None:
                self.seconds.append(time.perf_counter() - start)
        manager.wait()  # what is retired goes behind the training: it may meet the fault
        self._conclude()
        self.resident.append(resident_bytes())

    def _prepare(self, step: int, options: dict[str, Any]) -> None:
        writers = self.comm.size if "writers" in options or self.given.cut else 1
        fault = Fault(
            self.rng.choice(SURE), self.rng.randint(1, 3), self.rng.choice(ERRNOS)
        )
        victim = self.rng.randrange(writers)
        if step % EVERY == EVERY // 2:
            self.armed, self.victim = fault, victim
        if self.armed is not None and self.comm.rank == self.victim:
            self.hardship.arm(self.armed)

    def _conclude(self) -> None:
        """A fault that met nothing waits for the next save, on root, at its first call."""
        fired = self.hardship.disarm()
        self.hardship.spared = 0
        self.faulty = self.armed is not None and self.comm.allreduce(int(fired)) > 0
        if self.armed is None:
            return
        if self.faulty:
            self.faults += 1
            self.armed = None
        else:
            self.armed, self.victim = Fault("fsync", 1, self.armed.errno), 0

    def _note_open(self) -> None:
        gc.collect()
        files = len(os.listdir("/proc/self/fd"))
        self.open.append((files, threading.active_count()))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tenths(values: list[int]) -> list[float]:
    """Return the medians of ten parts of a run, one after the other."""
    size = max(1, len(values) // 10)
    return [statistics.median(values[at : at + size]) for at in range(0, len(values), size)]


def growth(settled: list[int]) -> float:
    """Return by what share memory grew over the saves after the warm-up."""
    part = max(1, len(settled) // 4)
    first, last = (statistics.median(s) for s in (settled[:part], settled[-part:]))
    return last / first - 1


def report_of(soak: Soak) -> dict[str, Any]:
    """Return the figures of a run, of all ranks. Collective."""
    comm = soak.comm
    wrong = [line for lines in comm.allgather(soak.wrong) for line in lines]
    opened = soak.open[WARM_UP:]
    if len(set(opened)) > 1 and opened[-1] > opened[0]:
        wrong.append(f"rank {comm.rank}: descriptors and threads grew: {opened}")
    if Counted.open:
        wrong.append(f"rank {comm.rank}: {Counted.open} communicators are not freed")
    if comm.rank == 0 and soak.hardship.most > KEEP + 1:
        wrong.append(f"{soak.hardship.most} generations at once, {KEEP + 1} may be")
    warm = max(WARM_UP * soak.given.turn, int(SETTLING * soak.given.saves))
    settled = soak.resident[warm:]
    seconds = sorted(soak.seconds)
    median, slowest = statistics.median(seconds), seconds[int(0.99 * (len(seconds) - 1))]
    most = soak.given.slowest
    if comm.rank == 0 and most is not None and slowest > most * median:
        wrong.append(f"one save in a hundred takes {slowest / median:.2f} times the median")
    return {
        "ranks": comm.size,
        "saves": soak.given.saves,
        "mib": soak.given.mib,
        "acknowledged": len(soak.resident) - sum(soak.failed.values()),
        "faults": soak.faults,
        "failed": dict(soak.failed),
        "wrong": sorted({line for lines in comm.allgather(wrong) for line in lines}),
        "most_generations_at_once": soak.hardship.most,
        "open_files_and_threads": comm.allgather((opened[0], opened[-1])),
        "memory_mib": comm.allgather(
            [round(nbytes / (1 << 20), 2) for nbytes in tenths(soak.resident)]
        ),
        "memory_growth": comm.allgather(round(growth(settled), 5)),
        "save_seconds_median": round(median, 4),
        "save_seconds_p99": round(slowest, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--saves", type=int, default=1000)
    parser.add_argument("--turn", type=int, default=25, help="saves of one manager")
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds an fsync more")
    parser.add_argument("--growth", type=float, default=0.01, help="of memory, at most")
    parser.add_argument(
        "--slowest",
        type=float,
        help="how many times the median the slowest save of a hundred may take; "
        "not judged unless given, as few saves on a busy machine prove nothing",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--cut", action="store_true", help="also state that is cut over the ranks"
    )
    given = parser.parse_args()
    soak = Soak(given.directory / "soak", given, MPI.COMM_WORLD)
    start = time.perf_counter()
    with quiet(), in_place_of_os(soak.hardship), contextlib.suppress(KeyboardInterrupt):
        soak.run()
    report = report_of(soak)
    report["wrong"] += [
        f"memory of rank {rank} grew by {share:.2%}"
        for rank, share in enumerate(report["memory_growth"])
        if share > given.growth
    ]
    report["seconds"] = round(time.perf_counter() - start, 1)
    if soak.comm.rank == 0:
        print(json.dumps(report, indent=1))
    sys.exit(1 if report["wrong"] else 0)


if __name__ == "__main__":
    main()
