# SPDX-License-Identifier: Apache-2.0
"""Two jobs want one directory, again and again; what was acknowledged is never lost.

One job saves all the time. In each round another one starts beside it and is refused; or
takes over from it: it was killed; or stopped, its lock given away, and it wakes beside its
successor; or its lock file was removed while it saved, with a successor at once or later;
or successors of a stopped job are killed as well before it wakes. Rounds and moments are
drawn at random. Whoever was cut off must end with `FencedError`, whoever came too soon with
`LockedError`, the same on all ranks; no number is given twice, and the steps of the
generations grow with their numbers: nobody has gone on from an older one.
``scripts/two_jobs`` runs this as a program.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.crash.faults import quiet
from tests.crash.killing import (
    end_job,
    everybody_of,
    fail_on_problem,
    kill,
    kill_some,
    remove_shared_memory,
    thread_states,
)
from tests.crash.world import Saved, Training, leftovers, scratch
from tests.launch import end_tree, finish_job, ranks_of, start_job
from tests.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import Popen

PROGRAM = str(Path(__file__).parent / "programs" / "rival.py")
SOON_SECONDS = 0.3
"""How long a job waits for another owner that will not go."""
PATIENCE_SECONDS = 20.0
"""How long for one that is about to die."""


@dataclass
class Job:
    """One that was started."""

    name: str
    process: Popen[str]


@dataclass
class Rounds:
    """Two jobs at a time over one directory.

    Attributes:
        directory: For all files; not yet made.
        seed: Draws what happens, and when.
        ranks: Of each job.
        counts: How much happened.
    """

    directory: Path
    seed: int
    ranks: int = 2
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._started: list[Job] = []
        self._owner: Job | None = None
        self._acked: list[tuple[int, int, str]] = []
        self._saves: Counter[str] = Counter()
        self._read = 0

    def run(self, scenes: int | None = None, seconds: float | None = None) -> None:
        """Go through so many rounds, or rounds for so long; then look at what is left.

        Raises:
            AssertionError: If anything is not as it must be.
        """
        every = (self.refused, self.killed, self.cut_off, self.robbed, self.cut_off_twice)
        self.directory.mkdir()
        end = time.monotonic() + (seconds or 0)
        drawn: list[Callable[[], None]] = []
        try:
            while time.monotonic() < end if scenes is None else scenes > 0:
                if not drawn:  # all before any comes again
                    drawn = self._rng.sample(every, len(every))
                scenes = None if scenes is None else scenes - 1
                drawn.pop()()
                self.counts["rounds"] += 1
                fail_on_problem(self.directory)
                self.look_at_numbers()
        finally:
            self.end_all()
        self.look_at_the_end()

    # Rounds. Each begins with no job, or with one that saves, and ends so.

    def refused(self) -> None:
        owner = self.need_owner()
        second = self.start(SOON_SECONDS)
        self.finish(second, "LockedError", self.ranks)
        self.counts["refused"] += 1
        self.wait_for_saves(owner)

    def killed(self) -> None:
        owner = self.need_owner()
        time.sleep(self._rng.random() / 2)
        everybody, running = everybody_of(owner.process)
        whom = kill_some(owner.process, self._rng, running)
        # At once: what is left of the dead job may still hold the lock, and save.
        successor = self.start(PATIENCE_SECONDS)
        end_job(owner.process, everybody)
        self._started.remove(owner)
        self.counts[f"killed: {whom}"] += 1
        self.take_over(successor)

    def cut_off(self) -> None:
        owner = self.need_owner()
        self.stop(owner)
        self.give_lock_away()
        successor = self.start(PATIENCE_SECONDS)
        self.take_over(successor)
        self.wake(owner)
        self.finish(owner, "FencedError", self.ranks)
        self.counts["woke beside a successor"] += 1
        self.wait_for_saves(successor)

    def robbed(self) -> None:
        """The lock file goes while the job saves, at any moment."""
        owner = self.need_owner()
        time.sleep(self._rng.random() / 4)
        self.give_lock_away()
        at_once = self._rng.random() < 0.5
        successor = self.start(PATIENCE_SECONDS) if at_once else None
        self.finish(owner, "FencedError", self.ranks)
        self.counts["lost its lock while it saved"] += 1
        self.take_over(successor or self.start(PATIENCE_SECONDS))

    def cut_off_twice(self) -> None:
        """Two successors of a stopped job: the first is killed, or stopped as well."""
        owner = self.need_owner()
        self.stop(owner)
        self.give_lock_away()
        first = self.start(PATIENCE_SECONDS)
        self.take_over(first)
        if self._rng.random() < 0.5:
            everybody, running = everybody_of(first.process)
            kill(running)
            end_job(first.process, everybody)
            self._started.remove(first)
            self.counts["killed: a successor"] += 1
            sleepers = [owner]
        else:
            self.stop(first)
            self.give_lock_away()
            sleepers = [owner, first]
        second = self.start(PATIENCE_SECONDS)
        self.take_over(second)
        self._rng.shuffle(sleepers)
        for sleeper in sleepers:
            self.wake(sleeper)
        for sleeper in sleepers:
            self.finish(sleeper, "FencedError", self.ranks)
            self.counts["woke beside a successor"] += 1
        self.wait_for_saves(second)

    # What rounds are made of.

    def start(self, patience: float) -> Job:
        self.counts["jobs"] += 1
        name = f"{self.counts['jobs']}"
        command = [PROGRAM, str(self.directory), name, str(patience)]
        # Its session is in a directory of its own: no mpirun of the same process id that
        # was killed has left one there.
        job = Job(name, start_job(self.ranks, command))
        self._started.append(job)
        return job

    def need_owner(self) -> Job:
        if self._owner is None:
            self.take_over(self.start(PATIENCE_SECONDS))
        assert self._owner is not None
        self.wait_for_saves(self._owner)
        time.sleep(self._rng.random() / 10)
        return self._owner

    def take_over(self, job: Job) -> None:
        """Return when a job has restored and saved."""
        self._wait(job, lambda: (self.directory / f"began-{job.name}").exists())
        self._owner = job
        self.counts["taken over"] += 1
        self.wait_for_saves(job)

    def wait_for_saves(self, job: Job, number: int = 2) -> None:
        """Return when a job has acknowledged some more saves."""
        before = self._saves_of(job)
        self._wait(job, lambda: self._saves_of(job) >= before + number)

    def stop(self, job: Job) -> None:
        """Stop the ranks of a job, one after the other, at any moment of a save."""
        ranks = ranks_of(job.process)
        assert len(ranks) == self.ranks
        self._rng.shuffle(ranks)
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        assert wait_for(lambda: all(thread_states(rank) == {"T"} for rank in ranks), 60)

    def wake(self, job: Job) -> None:
        for rank in ranks_of(job.process):
            os.kill(rank, signal.SIGCONT)

    def give_lock_away(self) -> None:
        """As a file server does that takes a host for dead: the next gets another file."""
        (self.directory / "ckpt" / ".lock").unlink()

    def finish(self, job: Job, error: str, ranks: int) -> None:
        """Wait for the end of a job; require the same error of all its ranks."""
        if job is self._owner:
            self._owner = None
        self._started.remove(job)
        outcome = finish_job(job.process)
        fail_on_problem(self.directory)
        assert outcome.code == 0, outcome.text
        ends = [self.directory / f"end-{job.name}-{rank}" for rank in range(ranks)]
        told = {end.read_text() for end in ends}
        assert len(told) == 1, told
        assert told.pop().startswith(f"{error}: "), ends[0].read_text()

    def end_all(self) -> None:
        for job in self._started:
            self.wake(job)
            everybody, _ = everybody_of(job.process)
            end_tree(job.process.pid)
            end_job(job.process, everybody)
        remove_shared_memory(self.directory)

    def look_at_numbers(self) -> None:
        """No number is given twice, and each generation goes on from the one before it."""
        acked = sorted((number, step) for number, step, _ in self._acknowledged())
        numbers = [number for number, _ in acked]
        steps = [step for _, step in acked]
        assert len(set(numbers)) == len(numbers), acked[-20:]
        assert steps == sorted(set(steps)), acked[-20:]
        self.counts["saves"] = len(acked)

    def look_at_the_end(self) -> None:
        root = self.directory / "ckpt"
        last = max([0, *(step for _, step, _ in self._acknowledged())])
        with quiet(), Training(root) as training:
            found = training.restore()
            assert found is not None
            assert found.step >= last, f"{found} came back, {last} was acknowledged"
            training.save(found.step + 1)
            training.move(0)
            assert training.restore() == Saved.of(found.step + 1)
            assert not leftovers(root)

    def _acknowledged(self) -> list[tuple[int, int, str]]:
        """Return number, step and job of every save that returned, in that order."""
        path = self.directory / "acked"
        if path.exists():
            with path.open() as file:
                file.seek(self._read)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]  # a line may be on its way
            self._read += len(whole)
            for line in whole.splitlines():
                number, step, name = line.split()
                self._acked.append((int(number), int(step), name))
                self._saves[name] += 1
        return self._acked

    def _saves_of(self, job: Job) -> int:
        self._acknowledged()
        return self._saves[job.name]

    def _wait(self, job: Job, condition: Callable[[], bool]) -> None:
        wait_for(lambda: condition() or job.process.poll() is not None, 120)
        fail_on_problem(self.directory)
        if not condition():
            ends = [path.read_text() for path in self.directory.glob(f"end-{job.name}-*")]
            ended = job.process.poll()
            self._started.remove(job)
            end_tree(job.process.pid)
            said = finish_job(job.process).text
            raise AssertionError(
                f"job {job.name} does not go on: ended with {ended}, {ends}, {said}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/two_jobs", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args()
    folder = scratch()
    rounds = Rounds(folder / "rounds", given.seed, given.ranks)
    start = time.monotonic()
    try:
        rounds.run(seconds=60 * given.minutes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        minutes = (time.monotonic() - start) / 60
        told = ", ".join(f"{number} {what}" for what, number in rounds.counts.items())
        print(f"seed {given.seed}, {minutes:.1f} minutes, {given.ranks} ranks: {told}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
