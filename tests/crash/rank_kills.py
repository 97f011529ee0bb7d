# SPDX-License-Identifier: Apache-2.0
"""Kills ranks of a job that recovers in place, again and again; it must end the same.

``examples/recover.py`` runs, with new ranks in place of lost ones or without. Victims and
moments are drawn at random: one rank, two at once, another one while the job recovers;
while it computes, meets, copies or saves. What comes to an end must have the losses and
weights of a run that nobody disturbed.
A job that does not recover is ended, counted, shown, and started again from what it saved,
as `mpi-ckpt run` would. ``scripts/rank_kills`` runs this as a program.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.launch import REPOSITORY, end_tree, environment, mpirun_path, ranks_of
from tests.waiting import limit

EXAMPLE = REPOSITORY / "examples" / "recover.py"
HOSTS = REPOSITORY / "scripts" / "virtual_hosts"
FLAGS = (
    *("--with-ft", "ulfm", "--oversubscribe", "--mca", "pml", "ob1"),
    *("--mca", "btl", "self,sm,tcp", "--mca", "mtl", "^ofi"),
)
START_SECONDS = 20
PATIENCE_SECONDS = limit(150)
"""More than all of the package's own patience with calls of MPI that do not return."""


@dataclass
class Figures:
    """What happened.

    Attributes:
        kills: Processes killed, by kind.
        recoveries: Recoveries in place.
        in_a_row: The most kills that one job has survived.
        unbroken: Kills, over all jobs, since the last one that did not recover.
        restarts: Jobs that did not recover, by how that showed.
        trainings: Trainings that ended, all with the same bits.
        shrunk: Trainings that ended with the same losses but for rounding, as they went on
            with fewer ranks.
        codes: How often mpirun ended with which code.
    """

    kills: Counter[str] = field(default_factory=Counter)
    recoveries: int = 0
    in_a_row: int = 0
    unbroken: int = 0
    restarts: list[str] = field(default_factory=list)
    trainings: int = 0
    shrunk: int = 0
    codes: Counter[int] = field(default_factory=Counter)

    def __str__(self) -> str:
        total, survived = self.kills.total(), self.in_a_row
        said = (
            f"{self.recoveries} recoveries, up to {survived} kills survived by one job and "
            f"the last {self.unbroken} by all"
        )
        ends = (
            f"{self.trainings} trainings ended as an undisturbed one, bit for bit, and "
            f"{self.shrunk} but for rounding, with fewer ranks"
        )
        return "\n".join(
            [
                f"{total} ranks killed, {said}:",
                *(f"  {number:5d}  {what}" for what, number in sorted(self.kills.items())),
                f"{ends}; exit codes {dict(self.codes)}",
                f"{len(self.restarts)} jobs did not recover",
                *(f"  {restart}" for restart in self.restarts),
            ]
        )


class Training:
    """One training in a folder; started, killed at, and started again if need be."""

    def __init__(
        self,
        folder: Path,
        *,
        ranks: int,
        steps: int,
        pace: float,
        hosts: str | None,
        replace: bool,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.ranks, self.steps, self.pace, self.hosts = ranks, steps, pace, hosts
        self.replace = replace
        self.log = folder / "log.jsonl"
        self.output = folder / "output.txt"
        self.job: subprocess.Popen[str] | None = None

    def start(self, *options: str) -> None:
        command = [
            *(sys.executable, str(EXAMPLE), "--max-recoveries", "10000"),
            *("--checkpoints", str(self.folder / "checkpoints"), "--log", str(self.log)),
            *("--steps", str(self.steps), "--pace", str(self.pace), "--ballast", "4"),
            *("--start-seconds", str(START_SECONDS)),
            *(["--replace"] if self.replace else []),
            *options,
        ]
        if self.hosts is None:
            launcher = [mpirun_path(), *FLAGS]
            extra = {}
        else:
            launcher = [str(HOSTS), "run", "--with-ft", "ulfm", "--mca", "mtl", "^ofi"]
            extra = {"VIRTUAL_HOSTS": self.hosts, "MPI": "openmpi"}
        with self.output.open("a") as file:
            self.job = subprocess.Popen(
                [*launcher, "-n", str(self.ranks), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment(extra),
                start_new_session=True,
                text=True,
            )

    @property
    def logged(self) -> int:
        """How many bytes have been logged."""
        return self.log.stat().st_size if self.log.exists() else 0

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """Return what was logged after so many bytes."""
        if not self.log.exists():
            return []
        with self.log.open() as file:
            file.seek(after)
            lines = file.read().splitlines(keepends=True)
        # A rank that was killed may have left half a line.
        return [
            json.loads(line) for line in lines if line[:1] == "{" and line[-2:] == "}\n"
        ]

    @property
    def has_shrunk(self) -> bool:
        """Whether it went on with fewer ranks, at least for a while."""
        sizes = {event["size"] for event in self.events() if event["event"] == "start"}
        return sizes != {self.ranks}

    def result(self) -> tuple[dict[int, str], set[str]]:
        """Return loss by step, and the fingerprints of the weights at the end."""
        losses: dict[int, str] = {}
        digests = set()
        for event in self.events():
            if event["event"] == "step":
                # The last counts. MPI: a collective in which a rank dies may end well, and
                # without its share; a step that is not met for afterwards is done again.
                losses[event["step"]] = event["loss"]
            elif event["event"] == "end":
                digests.add(event["digest"])
        return losses, digests

    def wait(self, seconds: float) -> int | None:
        assert self.job is not None
        with suppress(subprocess.TimeoutExpired):
            return self.job.wait(seconds)
        return None

    def end(self) -> None:
        if self.job is not None and self.job.poll() is None:
            end_tree(self.job.pid)
            self.job.wait()


class Killing:
    """Trainings, one after the other, until so many ranks have been killed."""

    def __init__(
        self,
        folder: Path,
        *,
        ranks: int,
        steps: int,
        seed: int,
        pace: float = 0.01,
        hosts: str | None = None,
        replace: bool = True,
    ) -> None:
        self.figures = Figures()
        self._folder, self._ranks, self._steps = folder, ranks, steps
        self._pace, self._hosts, self._replace = pace, hosts, replace
        self._rng = random.Random(seed)
        calm = self._make("calm", pace=0.0)
        calm.start()
        code = calm.wait(PATIENCE_SECONDS)
        calm.end()
        assert code == 0, calm.output.read_text()[-2000:]
        self._expected = calm.result()

    def kill(self, count: int) -> None:
        number = 0
        while self.figures.kills.total() < count:
            number += 1
            training = self._make(f"killed-{number}", pace=self._pace)
            try:
                self._kill_all_along(training, count)
            finally:
                training.end()

    def _make(self, name: str, *, pace: float) -> Training:
        return Training(
            self._folder / name,
            ranks=self._ranks,
            steps=self._steps,
            pace=pace,
            hosts=self._hosts,
            replace=self._replace,
        )

    def _kill_all_along(self, training: Training, count: int) -> None:
        self._start(training)
        survived = 0
        while self.figures.kills.total() < count:
            if not self._is_under_way(training) or self._is_last(training):
                break
            hit = self._kill_some(training)
            survived += hit
            if self._is_under_way(training):
                self.figures.recoveries += 1
                self.figures.unbroken += hit
                self.figures.in_a_row = max(self.figures.in_a_row, survived)
            elif not self._is_over(training):
                survived = 0
                self._start(training)
        code = training.wait(PATIENCE_SECONDS)
        if code is None:
            self._note(training, "does not end")
            return
        self.figures.codes[code] += 1
        if not self._is_over(training):
            self._note(training, f"ended too early with code {code}")
            return
        losses, digests = training.result()
        if training.has_shrunk:
            # Sums of other shares are rounded otherwise.
            _assert_close(losses, self._expected[0])
            self.figures.shrunk += 1
            return
        assert (losses, digests) == self._expected, f"another result: {training.folder}"
        self.figures.trainings += 1

    def _start(self, training: Training) -> None:
        self._seen = training.logged
        training.start()

    def _is_last(self, training: Training) -> bool:
        """Tell whether one rank is left of which nobody makes more."""
        assert training.job is not None
        return not self._replace and len(ranks_of(training.job)) == 1

    def _is_over(self, training: Training) -> bool:
        return any(event["event"] == "end" for event in training.events())

    def _is_under_way(self, training: Training) -> bool:
        """Wait until it trains since the last kill; False if it has ended, or is stuck."""
        assert training.job is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            new = training.events(self._seen)
            starts = [n for n, event in enumerate(new) if event["event"] == "start"]
            if starts and len(new) > starts[-1] + 2:
                return True
            if training.job.poll() is not None:
                if not self._is_over(training):
                    self._note(training, f"ended with code {training.job.returncode}")
                return False
            if any(event["event"] == "end" for event in new):
                return False
            time.sleep(0.02)
        self._note(training, "is stuck")
        return False

    def _note(self, training: Training, how: str) -> None:
        lines = training.output.read_text().splitlines()
        kept = training.folder / f"stuck-{len(self.figures.restarts)}.txt"
        kept.write_text("\n".join(lines))
        if training.job is not None and training.job.poll() is None:
            kept.write_text("\n".join([*lines, *map(stack, ranks_of(training.job))]))
        training.end()
        self.figures.unbroken = 0
        self.figures.restarts.append(f"{how} after: {self._last} ({kept})")

    def _kill_some(self, training: Training) -> int:
        """Kill one or two ranks, at a random moment; return how many."""
        assert training.job is not None
        time.sleep(self._rng.random() * 0.4)
        self._seen = training.logged
        alive = ranks_of(training.job)
        self._rng.shuffle(alive)
        kind = self._rng.choices(["one", "two at once", "one more meanwhile"], [5, 2, 3])[0]
        spared = 0 if self._replace else 1
        first = alive[spared:][: 2 if kind == "two at once" else 1]
        hit = sum(_kill(rank) for rank in first)
        self._last = f"{kind}: {first}"
        self.figures.kills[kind] += hit
        if kind == "one more meanwhile":
            time.sleep(self._rng.random() * 0.6)
            rest = [rank for rank in ranks_of(training.job) if rank not in first]
            if len(rest) > spared:
                rank = self._rng.choice(rest)
                self._last += f" then {rank}"
                more = _kill(rank)
                self.figures.kills[kind] += more
                hit += more
        return hit


def stack(process: int) -> str:
    """Return where a process is, for whoever has to find out why it stays there."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["gdb", "-p", str(process), "-batch", "-ex", "thread apply all bt 25"],
            capture_output=True,
            text=True,
            timeout=limit(30),
            check=False,
        )
        frames = [
            line for line in done.stdout.splitlines() if line.startswith(("#", "Thr"))
        ]
        return "\n".join([f"== process {process}", *frames])
    return f"== process {process}: not to be seen"


def _assert_close(losses: dict[int, str], expected: dict[int, str]) -> None:
    assert losses.keys() == expected.keys()
    for step, loss in losses.items():
        found, other = float.fromhex(loss), float.fromhex(expected[step])
        assert abs(found - other) <= 1e-6 * abs(other) + 1e-12, f"step {step}"


def _kill(process: int) -> int:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1


def main() -> int:
    """Kill, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shrink", action="store_true", help="no new ranks: each job goes down to one"
    )
    parser.add_argument("--hosts", help="where scripts/virtual_hosts keeps what is up")
    parser.add_argument("--keep", type=Path, help="folder for all that is written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rank-kills-") as scratch:
        folder = args.keep or Path(scratch)
        killing = Killing(
            folder,
            ranks=args.ranks,
            steps=args.steps,
            seed=args.seed,
            hosts=args.hosts,
            replace=not args.shrink,
        )
        try:
            killing.kill(args.kills)
        finally:
            print(killing.figures, flush=True)
    return 1 if killing.figures.restarts else 0


if __name__ == "__main__":
    sys.exit(main())
