# SPDX-License-Identifier: Apache-2.0
"""Jobs on two mounts of one NFS server, as on two hosts.

Run in a guest of scripts/nfs. ``two_mounts some``: few saves and one stop of the server;
``two_mounts every``: many saves, and a stop at every change that a save makes, by turns
before, inside and after it. Prints what was counted as JSON in its last line; whatever is
not as it must be is an AssertionError.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HANG_SECONDS = 120
"""An answer that takes longer never comes: soft mounts give each call up after seconds."""

MOMENTS = ("before", "inside", "after")


@dataclass(frozen=True)
class Answer:
    """What came of something that a job was asked to do; if it failed, what it said."""

    seconds: float
    value: Any = None
    error: str | None = None
    message: str = ""


class Job:
    """A job of one rank, in a process of its own."""

    def __init__(self, root: Path, role: str = "job") -> None:
        program = "tests.programs.mounted_job"
        self._process = subprocess.Popen(
            [sys.executable, "-m", program, role, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, verb: str, *arguments: Any) -> Any:
        """Have something done that must succeed; return its value."""
        answer = self.try_to(verb, *arguments)
        assert answer.error is None, f"{verb}{arguments}: {answer}"
        return answer.value

    def is_refused(self, name: str, verb: str, *arguments: Any) -> str:
        """Require an error of that name; return what it says."""
        answer = self.try_to(verb, *arguments)
        assert answer.error == name, f"{verb}{arguments}: {answer}, not {name}"
        return answer.message

    def try_to(self, verb: str, *arguments: Any) -> Answer:
        """Have something done that may fail with an error of the library."""
        print(json.dumps([verb, *arguments]), file=self._process.stdin, flush=True)
        # Each answer is one line and was asked for: no other lies in the buffer.
        answers = self._process.stdout
        assert select.select([answers], [], [], HANG_SECONDS)[0], f"{verb} hangs"
        line = answers.readline()
        assert line, f"the job died of {verb}"
        return Answer(**json.loads(line))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@dataclass
class Counts:
    """What was done, and found."""

    saves_seen: int = 0
    turns: int = 0
    stops: int = 0
    failed_saves: int = 0
    longest_failure_seconds: float = 0.0
    features: dict[str, bool] = field(default_factory=dict)


def each_save_is_seen(here: Path, there: Path, saves: int, counts: Counts) -> None:
    """One job saves and prunes; a reader on the other mount finds each save at once."""
    with Job(here) as writer, Job(there, "reader") as reader:
        assert writer.ask("restore") is None
        counts.features = writer.ask("features")
        for step in range(1, saves + 1):
            writer.ask("save", step)
            found = reader.ask("restore")
            assert found == step, f"{step} is acknowledged, {found} is seen"
            counts.saves_seen += 1


def jobs_take_turns(here: Job, other: Job, turns: int, counts: Counts) -> None:
    """A job goes on where one on the other mount has ended, back and forth."""
    step = here.ask("restore")
    here.ask("close")
    for job in itertools.islice(itertools.cycle((other, here)), turns):
        found = job.ask("restore")
        assert found == step, f"{step} is acknowledged, {found} came back"
        step += 1
        job.ask("save", step)
        job.ask("close")
        counts.turns += 1


def second_job_is_refused(here: Path, there: Path) -> None:
    """While a job lives its lock holds on the other mount; when it is killed it is gone."""
    with Job(here) as holder, Job(there) as second:
        step = holder.ask("restore")
        message = second.is_refused("LockedError", "restore")
        assert "belongs to another running job (job " in message, message
        holder.ask("save", step + 1)
        holder.kill()
        assert second.ask("restore") == step + 1
        second.ask("save", step + 2)


def successor_fences_off(here: Path, there: Path) -> None:
    """A job that lost its lock reads on its mount what its successor signed on another."""
    with Job(here) as old, Job(there) as successor:
        step = old.ask("restore")
        old.ask("save", step + 1)
        old.ask("lose_lock")
        assert successor.ask("restore") == step + 1
        successor.ask("save", step + 2)
        message = old.is_refused("FencedError", "save", step + 3)
        assert "taken over" in message, message
        assert successor.ask("restore") == step + 2
        successor.ask("save", step + 3)
        assert successor.ask("leftovers") == []


def server_stops(job: Job, other: Job, mode: str, counts: Counts) -> None:
    """Stop the server in mid-save: an error at last, and nothing lost when it is back."""
    step = job.ask("restore") + 1
    changes = job.ask("save_counted", step)
    for number in range(1, changes + 1) if mode == "every" else (changes // 2,):
        when = MOMENTS[number % len(MOMENTS)]
        may_come = save_while_server_stops(job, step + 1, number, when, counts)
        server("start")
        found = job.ask("restore")
        assert found in may_come, f"{found} came back, none of {may_come}"
        job.ask("save", step + 2)
        assert job.ask("leftovers") == []
        job.ask("close")
        assert other.ask("restore") == step + 2
        step += 3
        other.ask("save", step)
        other.ask("close")
        assert job.ask("restore") == step
        counts.stops += 1


def save_while_server_stops(
    job: Job, step: int, number: int, when: str, counts: Counts
) -> set[int]:
    """Return the steps of which one must come back."""
    answer = job.try_to("save_while_server_stops", step, number, when)
    if answer.error is None:
        return {step}
    assert "Input/output error" in answer.message, answer
    counts.failed_saves += 1
    counts.longest_failure_seconds = max(counts.longest_failure_seconds, answer.seconds)
    return {step - 1, step}  # the new one whole, or not at all


def server(word: str) -> None:
    subprocess.run([os.environ["NFS_SERVER"], word], check=True, timeout=HANG_SECONDS)


def main() -> None:
    mode, counts = sys.argv[1], Counts()
    saves = 50 if mode == "every" else 6
    here, there = (Path(mount, "ckpt") for mount in os.environ["NFS_MOUNTS"].split(":"))
    each_save_is_seen(here, there, saves, counts)
    with Job(here) as job, Job(there) as other:
        jobs_take_turns(job, other, saves // 2, counts)
        server_stops(job, other, mode, counts)
    second_job_is_refused(here, there)
    successor_fences_off(here, there)
    print(json.dumps(asdict(counts)))


if __name__ == "__main__":
    main()
