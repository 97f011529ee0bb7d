# SPDX-License-Identifier: Apache-2.0
"""Jobs of the integration tests: watched through what they write, ended if they hang."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.crash.killing import wait_for_death
from tests.launch import (
    REPOSITORY,
    Outcome,
    descendants,
    end_tree,
    finish_job,
    ranks_of,
    start_job,
)
from tests.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from subprocess import Popen

PROGRAMS = Path(__file__).parent / "programs"
EXAMPLES = REPOSITORY / "examples"

# No step of a test takes a tenth of this on an idle machine; on a busy one the start of a
# program alone took half a minute.
PATIENCE_SECONDS = 120


class Jobs:
    """Starts jobs; whatever still runs when the test is over is ended."""

    def __init__(self) -> None:
        self._started: list[Popen[str]] = []
        self.flags: tuple[str, ...] = ()  # what mpirun is given besides

    def start(self, ranks: int, *command: object, **env: str) -> Popen[str]:
        job = start_job(ranks, [str(part) for part in command], env=env, flags=self.flags)
        self._started.append(job)
        return job

    def finish(self, job: Popen[str], patience: float = PATIENCE_SECONDS) -> Outcome:
        self._started.remove(job)
        return finish_job(job, timeout=patience)

    def run(self, ranks: int, *command: object, **env: str) -> Outcome:
        return self.finish(self.start(ranks, *command, **env))

    def kill(self, job: Popen[str]) -> None:
        """Kill all of a job at once, as the loss of its node would."""
        everybody = descendants(job.pid)
        end_tree(job.pid)
        self.finish(job)
        wait_for_death(everybody)

    def wait_until(self, job: Popen[str], condition: Callable[[], bool]) -> None:
        """Return when a condition holds; fail if the job ends, or hangs, before."""
        if not wait_for(
            lambda: condition() or job.poll() is not None, PATIENCE_SECONDS, 0.005
        ):
            end_tree(job.pid)
            raise AssertionError(f"waited in vain: {self.finish(job).text}")
        if not condition():
            raise AssertionError(f"too early an end: {self.finish(job).text}")

    def end_all(self) -> None:
        for job in list(self._started):
            self.kill(job)


@contextlib.contextmanager
def jobs_of_a_test() -> Iterator[Jobs]:
    jobs = Jobs()
    try:
        yield jobs
    finally:
        jobs.end_all()


def logged(log: Path) -> list[dict[str, Any]]:
    """Return the lines of JSON in a log, but for one that is still being written."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Training:
    """A training example in a folder of its own: started, watched, started again."""

    def __init__(
        self,
        jobs: Jobs,
        folder: Path,
        *,
        epochs: int,
        program: str = "train.py",
        **options: object,
    ) -> None:
        self.program = program
        self.jobs = jobs
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.log = folder / "log.jsonl"
        self.options = {"epochs": epochs, "interval": 10, **options}

    @property
    def command(self) -> list[str]:
        options = [f"--{name}={value}" for name, value in self.options.items()]
        files = [f"--checkpoints={self.checkpoints}", f"--log={self.log}"]
        return [str(EXAMPLES / self.program), *files, *options]

    def start(self, ranks: int, **env: str) -> Popen[str]:
        # Each rank leaves the code it exits with in a file of the folder.
        noting = (PROGRAMS / "note_exit.py", self.folder)
        return self.jobs.start(ranks, *noting, *self.command, **env)

    def run(self, ranks: int) -> Outcome:
        return self.jobs.finish(self.start(ranks))

    def start_until(self, ranks: int, step: int) -> Popen[str]:
        """Return a job that has come to a step, and is slow enough to be caught there."""
        before = len(self.events())
        job = self.start(ranks, TEST_PACE="0.03", TEST_HOLD=str(step))

        def has_come() -> bool:
            return any(event.get("step", 0) >= step for event in self.steps_since(before))

        self.jobs.wait_until(job, has_come)
        return job

    def steps_since(self, before: int) -> list[dict[str, Any]]:
        """The steps logged after so many events."""
        return [event for event in self.events()[before:] if event["event"] == "step"]

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        return [event for event in logged(self.log) if kind in (None, event["event"])]

    @property
    def step(self) -> int:
        """The step last logged."""
        return max((event["step"] for event in self.events()), default=0)

    @property
    def digest(self) -> str:
        """Fingerprint of the weights it has ended with."""
        (end,) = self.events("end")
        return end["digest"]

    def exits(self) -> dict[int, str]:
        """The exit code that each rank of the last run has noted."""
        notes = self.folder.glob("exit-*")
        return {int(note.name.removeprefix("exit-")): note.read_text() for note in notes}

    def samples(self) -> dict[int, int]:
        """Samples trained on in each epoch, as the last run through it has summed up."""
        return {event["epoch"]: event["samples"] for event in self.events("epoch")}


def process_of(job: Popen[str], rank: int) -> int:
    """Return the process id of a rank, told by what the launcher has set for it."""
    pattern = re.compile(rb"(?:^|\0)(?:OMPI_COMM_WORLD_RANK|PMI_RANK)=(\d+)")
    for process in ranks_of(job):
        with contextlib.suppress(OSError):
            found = pattern.search(Path(f"/proc/{process}/environ").read_bytes())
            if found and int(found[1]) == rank:
                return process
    raise AssertionError(f"rank {rank} is not running")


def signal_to(job: Popen[str], number: int, rank: int | None) -> None:
    """Send a signal to one rank, or to mpirun if it is None."""
    os.kill(job.pid if rank is None else process_of(job, rank), number)
