# SPDX-License-Identifier: Apache-2.0
"""Jobs that are asked to stop at bad moments, or by a clock, a file, a wrong variable."""

from __future__ import annotations

import re
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.jobs import PROGRAMS, Jobs, signal_to

if TYPE_CHECKING:
    from pathlib import Path
    from subprocess import Popen

    from tests.launch import Outcome


class Stoppable:
    """programs/stoppable.py in a folder of its own."""

    def __init__(self, jobs: Jobs, folder: Path) -> None:
        self.jobs = jobs
        self.root = folder / "root"
        self.notes = folder / "notes"
        self.notes.mkdir()

    def start(self, ranks: int, *arguments: object, **env: str) -> Popen[str]:
        for note in self.notes.iterdir():
            note.unlink()
        program = (PROGRAMS / "note_exit.py", self.notes, PROGRAMS / "stoppable.py")
        return self.jobs.start(ranks, *program, self.root, self.notes, *arguments, **env)

    def wait_for_note(self, job: Popen[str], name: str) -> None:
        self.jobs.wait_until(job, (self.notes / name).exists)

    def wait_for_step(self, job: Popen[str], step: int) -> None:
        self.jobs.wait_until(job, lambda: self.steps >= step)

    @property
    def steps(self) -> int:
        note = self.notes / "steps"
        return int((note.read_text() if note.exists() else "") or 0)

    def run_until(self, ranks: int, step: int) -> None:
        job = self.start(ranks)
        self.wait_for_step(job, step)
        signal_to(job, signal.SIGTERM, ranks - 1)
        self.finish(job, ranks)

    def generations(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("checkpoint-*"))

    def finish(self, job: Popen[str], ranks: int) -> Outcome:
        """Require every rank to leave with 143, and the last step to be saved."""
        outcome = self.jobs.finish(job)
        assert outcome.code == 143, outcome.text
        exits = {(self.notes / f"exit-{rank}").read_text() for rank in range(ranks)}
        assert exits == {"143"}, outcome.text
        (told,) = re.findall(r"stopped at (\d+) of (\d+)", outcome.out)
        assert told[0] == told[1]
        assert "Traceback" not in outcome.err
        return outcome


@pytest.fixture
def stoppable(jobs: Jobs, tmp_path: Path) -> Stoppable:
    return Stoppable(jobs, tmp_path)


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        pytest.param(signal.SIGTERM, 1, id="SIGTERM-to-one-rank"),
        pytest.param(signal.SIGINT, 0, id="SIGINT-to-root"),
        # What schedulers are told to send, and both MPIs hand on to the ranks.
        pytest.param(signal.SIGUSR1, None, id="SIGUSR1-to-mpirun"),
    ],
)
def test_a_signal_stops_all_and_no_step_is_lost(
    stoppable: Stoppable, number: int, rank: int | None
) -> None:
    job = stoppable.start(2)
    stoppable.wait_for_step(job, 7)
    signal_to(job, number, rank)
    first = stoppable.finish(job, 2)
    job = stoppable.start(2)
    stoppable.wait_for_step(job, 7)
    signal_to(job, number, rank)
    second = stoppable.finish(job, 2)
    assert "resumed at 0" in first.out
    (stopped,) = re.findall(r"stopped at (\d+)", first.out)
    assert f"resumed at {stopped}" in second.out, "a step was lost, or done twice"


@pytest.mark.parametrize("doing", ["save", "restore"])
def test_a_signal_in_the_middle(stoppable: Stoppable, doing: str) -> None:
    if doing == "restore":
        stoppable.run_until(2, step=3)
    job = stoppable.start(2, 1.5, 1.5)
    stoppable.wait_for_note(job, f"{doing}-1")
    # Twice, and on one rank only.
    signal_to(job, signal.SIGTERM, 1)
    time.sleep(0.1)
    signal_to(job, signal.SIGUSR1, 1)
    stoppable.finish(job, 2)
    assert not list(stoppable.root.glob(".partial-*"))


def test_a_time_that_is_up_before_the_start(stoppable: Stoppable) -> None:
    job = stoppable.start(2, MPI_CKPT_DEADLINE=str(time.time() - 5))
    outcome = stoppable.finish(job, 2)
    assert "stopped at 1 of" in outcome.out, "no more than a step was taken"
    assert outcome.err.count("the job should have ended") == 1


def test_a_time_shorter_than_a_save_costs_nothing_saved(
    stoppable: Stoppable, jobs: Jobs
) -> None:
    stoppable.run_until(2, step=6)
    before = stoppable.generations()
    job = stoppable.start(2, 30, 0, MPI_CKPT_DEADLINE=str(time.time() + 2))
    stoppable.wait_for_note(job, "save-0")
    time.sleep(1)  # the scheduler kills the job in the midst of its save
    jobs.kill(job)
    assert stoppable.generations() == before


def test_a_halt_file_stops_this_run_and_the_next(stoppable: Stoppable) -> None:
    job = stoppable.start(2)
    stoppable.wait_for_step(job, 6)
    halt = stoppable.root / "halt"
    halt.touch()
    stoppable.finish(job, 2)
    outcome = stoppable.finish(stoppable.start(2), 2)
    assert f"{halt} is there; remove it before the next run" in outcome.err
    assert stoppable.steps == 0, "it stopped at its first step, before any was noted"
    assert halt.exists()


def test_variables_of_another_job_stop_nobody(stoppable: Stoppable) -> None:
    foreign = {"SLURM_JOB_ID": "42", "SLURM_JOB_END_TIME": str(int(time.time()) - 9000)}
    job = stoppable.start(2, **foreign)
    stoppable.wait_for_step(job, 12)
    signal_to(job, signal.SIGTERM, 1)
    outcome = stoppable.finish(job, 2)
    assert outcome.err.count("taken for another job's, not used") == 1


def test_the_job_is_saved_before_its_time_is_up(stoppable: Stoppable) -> None:
    end = int(time.time()) + 7
    env = {"SLURM_JOB_ID": "42", "SLURM_JOB_END_TIME": str(end)}
    outcome = stoppable.finish(stoppable.start(2, **env), 2)
    assert re.search(r"\d+ s (ago )?by SLURM_JOB_END_TIME", outcome.err)


def test_a_duration_is_refused_before_anything_is_done(stoppable: Stoppable) -> None:
    job = stoppable.start(2, MPI_CKPT_DEADLINE="4:00:00")
    outcome = stoppable.jobs.finish(job)
    assert outcome.code not in (0, 124), outcome.text
    exits = [(stoppable.notes / f"exit-{rank}").read_text() for rank in range(2)]
    assert exits[0] == exits[1]
    assert exits[0].startswith("OptionsError: ")
    assert "MPI_CKPT_DEADLINE='4:00:00' is not a point in time" in exits[0]
    assert not stoppable.root.exists()
