# SPDX-License-Identifier: Apache-2.0
"""Ranks are lost and the job goes on: mpi_ckpt.elastic.run, wherever a rank may die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.crash.rank_kills import FLAGS, Killing
from tests.hosts import installed_mpi
from tests.jobs import EXAMPLES, PROGRAMS
from tests.launch import REPOSITORY, environment, mpirun_path
from tests.loop import Loop
from tests.waiting import limit

if TYPE_CHECKING:
    from tests.jobs import Jobs
    from tests.launch import Outcome

EXAMPLE = EXAMPLES / "recover.py"
PROGRAM = PROGRAMS / "recovering.py"
HEARTBEAT = (
    *("--mca", "mpi_ft_detector", "1", "--mca", "mpi_ft_detector_period", "0.2"),
    *("--mca", "mpi_ft_detector_timeout", "6"),
)
# Whatever died, 30 steps of the sum of 0 to 11.
VALUE = 30 * 66.0


# In the default run another of its kind is.
long = pytest.mark.long
survives = pytest.mark.skipif(
    installed_mpi() != "openmpi", reason="only Open MPI survives a rank"
)


class Story:
    """What a job has written, line by line."""

    def __init__(self, outcome: Outcome, log: Path) -> None:
        self.outcome = outcome
        self.lines = [json.loads(line) for line in log.read_text().splitlines()]

    def all(self, key: str) -> list[Any]:
        return [event[key] for event in self.lines if key in event]


@pytest.fixture
def ulfm(jobs: Jobs) -> Jobs:
    jobs.flags = FLAGS
    return jobs


def tell(jobs: Jobs, folder: Path, how: str, *more: str, ranks: int = 4) -> Story:
    log = folder / "log.jsonl"
    outcome = jobs.run(ranks, PROGRAM, folder / "root", log, how, *more)
    assert outcome.code != 124, outcome.text
    return Story(outcome, log)


@pytest.fixture(scope="module")
def calm(module_jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The example, with nobody killed."""
    return recover(module_jobs, tmp_path_factory.mktemp("calm"))


def recover(jobs: Jobs, folder: Path, *options: str, ranks: int = 4) -> Story:
    files = ["--checkpoints", folder / "checkpoints", "--log", folder / "log.jsonl"]
    outcome = jobs.run(ranks, EXAMPLE, *files, "--steps", 60, *options)
    return Story(outcome, folder / "log.jsonl")


def losses(story: Story) -> dict[int, str]:
    return {
        event["step"]: event["loss"] for event in story.lines if event["event"] == "step"
    }


@survives
def test_with_new_ranks_nothing_is_other_than_without_kills(
    ulfm: Jobs, calm: Story, tmp_path: Path
) -> None:
    kills = ["--replace", "--kill", "12:2", "25:0", "38:1,3"]
    story = recover(ulfm, tmp_path, *kills)
    starts = [event for event in story.lines if event["event"] == "start"]
    found = [
        (event["size"], event["lost"], event["step"], event["source"]) for event in starts
    ]
    assert found == [
        (4, 0, 0, "nothing"), (4, 1, 10, "memory"), (4, 2, 25, "memory"),
        (4, 4, 35, "memory"),
    ], story.outcome.text  # fmt: skip
    assert losses(story) == losses(calm)
    assert story.all("digest") == calm.all("digest")
    assert story.outcome.out.count(story.all("digest")[0][:16]) == 4
    # MPI: 137 if one of the killed had itself been started in place of another.
    assert story.outcome.code in (0, 137), story.outcome.text


@survives
def test_with_those_that_are_left_it_goes_on_to_the_last_one(
    ulfm: Jobs, calm: Story, tmp_path: Path
) -> None:
    story = recover(ulfm, tmp_path, "--kill", "12:2", "25:0", "38:0")
    starts = [event for event in story.lines if event["event"] == "start"]
    assert [event["size"] for event in starts] == [4, 3, 2, 1], story.outcome.text
    assert "lost rank(s) 0 of 3; going on with 2, 0 of them new" in story.outcome.err
    # Sums of other shares are rounded otherwise.
    ours, theirs = losses(story), losses(calm)
    assert list(ours) == list(theirs)
    assert all(
        float.fromhex(ours[n]) == pytest.approx(float.fromhex(theirs[n])) for n in ours
    )
    assert story.outcome.code == 0, story.outcome.text


@survives
def test_all_but_one_at_once_and_the_last_goes_on_alone(ulfm: Jobs, tmp_path: Path) -> None:
    story = recover(ulfm, tmp_path, "--kill", "12:0,1,3")
    starts = [event for event in story.lines if event["event"] == "start"]
    assert [(event["size"], event["source"]) for event in starts] == [
        (4, "nothing"), (1, "memory"),
    ]  # fmt: skip
    assert len(story.all("digest")) == 1
    assert story.outcome.code == 0, story.outcome.text


@survives
def test_all_but_one_at_once_and_new_ranks_come(
    ulfm: Jobs, calm: Story, tmp_path: Path
) -> None:
    story = recover(ulfm, tmp_path, "--replace", "--kill", "12:0,1,3")
    starts = [event for event in story.lines if event["event"] == "start"]
    assert [(event["size"], event["lost"], event["source"]) for event in starts] == [
        (4, 0, "nothing"), (4, 3, "memory"),
    ], story.outcome.text  # fmt: skip
    assert losses(story) == losses(calm)
    assert story.all("digest") == calm.all("digest")
    assert story.outcome.code == 0, story.outcome.text


@survives
@pytest.mark.parametrize(
    ("how", "replace"),
    [
        ("publish", ()),
        ("write", ("replace",)),
        pytest.param("publish", ("replace",), marks=long),
        pytest.param("write", (), marks=long),
    ],
)
def test_a_rank_killed_inside_a_save(
    ulfm: Jobs, tmp_path: Path, how: str, replace: tuple[str, ...]
) -> None:
    story = tell(ulfm, tmp_path, how, *replace)
    # Root dies in the save of step 20, after the copies in memory were made.
    assert story.all("step") == [0, 20], story.outcome.text
    assert story.all("memory") == [False, True]
    assert len(story.all("partials")[1]) == 1  # it is there, and swept by the next save
    assert not list((tmp_path / "root").glob(".partial-*"))
    assert (tmp_path / "root" / "checkpoint-00000001" / "manifest.json").exists()
    assert story.all("value") == [VALUE]


@survives
@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        ("ours", [4, 3]),
        ("plain", [4, 3]),
        pytest.param("met", [4, 2], marks=long),
        pytest.param("shrink", [4, 2], marks=long),
        ("order", [4, 2]),
        ("again", [4, 2]),
        ("stuck", [4, 3]),
    ],
)
def test_a_rank_killed_in_a_collective_or_in_the_recovery(
    ulfm: Jobs, tmp_path: Path, how: str, sizes: list[int]
) -> None:
    story = tell(ulfm, tmp_path, how)
    assert story.all("size") == sizes, story.outcome.text
    assert story.all("value") == [VALUE]
    assert story.outcome.code == 0, story.outcome.text


@survives
@pytest.mark.parametrize("how", ["order", pytest.param("again", marks=long)])
def test_a_rank_killed_in_a_recovery_with_new_ranks(
    ulfm: Jobs, tmp_path: Path, how: str
) -> None:
    story = tell(ulfm, tmp_path, how, "replace")
    assert set(story.all("size")) == {4}, story.outcome.text
    assert story.all("value") == [VALUE]


@survives
def test_if_no_rank_can_be_started_it_goes_on_with_fewer(
    ulfm: Jobs, tmp_path: Path
) -> None:
    story = tell(ulfm, tmp_path, "unstartable", "replace")
    assert story.all("size") == [4, 3], story.outcome.text
    assert "no rank can be started; going on with fewer" in story.outcome.err
    assert "going on with 3, 0 of them new" in story.outcome.err
    assert story.all("value") == [VALUE]
    assert story.outcome.code == 0, story.outcome.text


@survives
@long
@pytest.mark.parametrize("how", ["newcomer", "starter"])
def test_a_rank_killed_while_a_new_one_starts(ulfm: Jobs, tmp_path: Path, how: str) -> None:
    # Takes the 20 s after which the starter, or what it has started, is ended.
    story = tell(ulfm, tmp_path, how, "replace")
    assert story.all("size") == [4, 4], story.outcome.text
    assert "lost rank(s) 2, 3 of 4; going on with 4, 2 of them new" in story.outcome.err
    assert story.all("value") == [VALUE]


@survives
@long
def test_a_rank_killed_while_a_new_one_is_joined(tmp_path: Path) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/bash\nexec mpirun {" ".join(FLAGS)} "$@"\n')
    launcher.chmod(0o755)
    log = tmp_path / "log.jsonl"
    words = [
        *("--np", 4, "--backoff", 0.1, "--launcher", launcher, "--", "python", PROGRAM),
        *(tmp_path / "root", log, "merge", "replace"),
    ]
    with Loop(tmp_path, *words) as loop:
        answer = loop.finish()
    assert answer["finished"], answer
    assert len(answer["attempts"]) == 2, answer
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    # The first has ended by itself; the second is of the generation of step 10.
    assert [(line["failures"], line["step"]) for line in lines if "size" in line][:2] == [
        (0, 0), (0, 10),
    ]  # fmt: skip
    assert lines[-1]["value"] == VALUE


@survives
def test_a_stopped_rank_is_a_lost_one_by_its_heartbeat(jobs: Jobs, tmp_path: Path) -> None:
    jobs.flags = (*FLAGS, *HEARTBEAT)
    log = tmp_path / "log.jsonl"
    job = jobs.start(3, PROGRAM, tmp_path / "root", log, "stopped")
    jobs.wait_until(job, lambda: log.exists() and "value" in log.read_text())
    jobs.end_all()  # mpirun waits for it as well
    story = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["size"] for event in story if "size" in event] == [3, 2]
    assert story[-1]["value"] == VALUE


@survives
def test_a_rank_that_is_late_is_not_lost(ulfm: Jobs, tmp_path: Path) -> None:
    story = tell(ulfm, tmp_path, "late", ranks=3)
    assert story.all("size") == [3]
    assert "did not arrive within 3 s" in story.outcome.err, story.outcome.text
    assert "going on with" not in story.outcome.err
    assert story.all("value") == []


@survives
def test_an_error_of_one_rank_ends_the_job(ulfm: Jobs, tmp_path: Path) -> None:
    story = tell(ulfm, tmp_path, "error", ranks=3)
    assert story.all("size") == [3]
    assert "ValueError: bad luck" in story.outcome.err
    assert story.outcome.code == 1, story.outcome.text


@survives
def test_too_many_losses_are_an_error(ulfm: Jobs, tmp_path: Path) -> None:
    story = tell(ulfm, tmp_path, "too_many", ranks=3)
    assert "ranks were lost 1 times, max_recoveries is 0" in story.outcome.err
    assert story.all("value") == []


@survives
def test_the_exit_code_of_a_program_that_recovered(ulfm: Jobs, tmp_path: Path) -> None:
    story = tell(ulfm, tmp_path, "leave", ranks=3)
    assert story.all("size") == [3, 2], story.outcome.text
    assert story.outcome.code == 7, story.outcome.text


def test_where_a_lost_rank_ends_the_job_that_is_said_once(
    jobs: Jobs, tmp_path: Path
) -> None:
    # Open MPI without --with-ft, MPICH always.
    lost = tell(jobs, tmp_path, "plain", ranks=2)
    assert lost.outcome.code != 0
    assert lost.all("value") == []
    assert lost.outcome.err.count("a lost rank ends this job: ") == 1
    # The same command again: from the generation of step 10.
    (tmp_path / "log.jsonl").unlink()
    story = tell(jobs, tmp_path, "none", ranks=2)
    assert story.outcome.code == 0, story.outcome.text
    assert story.all("step") == [10]
    assert story.all("value") == [VALUE]


@survives
@pytest.mark.long
def test_recovery_can_be_measured(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    options = ["--smoke", "--json", lines]
    path = os.pathsep.join([str(Path(mpirun_path()).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "recovery", *map(str, options)],
        env=environment({"PATH": path}),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=limit(280),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [event["how"] for event in found] == [
        "fewer", "spare", "replaced", "restarted",
    ]  # fmt: skip
    assert all(event["from_kill"][0] >= event["from_seen"][0] > 0 for event in found)


@survives
@long
@pytest.mark.timeout(1500)
def test_fifty_kills_in_a_row(tmp_path: Path) -> None:
    killing = Killing(tmp_path, ranks=4, steps=3000, seed=1)
    killing.kill(50)
    assert killing.figures.restarts == [], str(killing.figures)
