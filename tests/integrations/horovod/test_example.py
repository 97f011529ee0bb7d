# SPDX-License-Identifier: Apache-2.0
"""The example beside a real Horovod, killed and gone on with."""

from __future__ import annotations

import random
import signal

import pytest

from tests.draws import SEED
from tests.jobs import EXAMPLES, jobs_of_a_test, logged, signal_to

BATCHES = 30 * 3


@pytest.fixture
def jobs():
    with jobs_of_a_test() as jobs:
        yield jobs


@pytest.fixture
def start(jobs, tmp_path):
    """Starts the example on two ranks in a folder of a name."""

    def start(name, pause=0.0):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        places = f"--checkpoints={folder / 'commits'}", f"--log={folder / 'log'}"
        options = "--epochs=3", "--interval=5", f"--pause={pause}"
        return jobs.start(2, EXAMPLES / "horovod_elastic.py", *places, *options)

    return start


def events(folder, kind):
    return [event for event in logged(folder / "log") if event["event"] == kind]


def wait_for(jobs, job, folder, batch):
    """Return once a batch was committed."""
    jobs.wait_until(
        job, lambda: any(event["batch"] >= batch for event in events(folder, "commit"))
    )


def test_the_example_killed_at_random_points_ends_with_the_same_weights(
    jobs, start, tmp_path
):
    outcome = jobs.finish(start("whole"))
    assert outcome.code == 0, outcome.text
    (whole,) = events(tmp_path / "whole", "end")
    assert whole["batch"] == whole["losses"] == BATCHES

    points, folder, reached = random.Random(SEED), tmp_path / "killed", 0
    for turn in range(4):
        job = start("killed", pause=0.01)
        wait_for(jobs, job, folder, reached + points.randrange(6, 18))
        if turn % 2:
            jobs.kill(job)
        else:
            signal_to(job, signal.SIGKILL, points.randrange(2))
            outcome = jobs.finish(job)
            assert outcome.code not in (0, 124), (SEED, outcome.text)
        reached = events(folder, "commit")[-1]["batch"]
    outcome = jobs.finish(start("killed"))
    assert outcome.code == 0, (SEED, outcome.text)
    starts = [event["batch"] for event in events(folder, "start")]
    assert starts == sorted(starts), SEED
    assert starts[-1] > 0, SEED
    assert events(folder, "end") == [whole], SEED


def test_the_example_stops_when_asked_to_and_loses_nothing(jobs, start, tmp_path):
    folder = tmp_path / "stopped"
    job = start("stopped", pause=0.01)
    wait_for(jobs, job, folder, 20)
    signal_to(job, signal.SIGTERM, 1)
    outcome = jobs.finish(job)
    assert outcome.code == 143, outcome.text
    done = events(folder, "commit")[-1]["batch"] + 1  # the last commit left by the code
    outcome = jobs.finish(start("stopped"))
    assert outcome.code == 0, outcome.text
    assert events(folder, "start")[-1]["batch"] == done
    assert events(folder, "end")[0]["losses"] == BATCHES


def last_line(text):
    return [line for line in text.splitlines() if line.startswith("epoch 9")]


def test_a_plain_script_with_ten_more_lines_goes_on_after_a_kill(jobs, tmp_path):
    plain = jobs.run(2, EXAMPLES / "horovod_plain.py")
    assert plain.code == 0, plain.text

    def start():
        return jobs.start(2, "-c", IN_ANOTHER_FOLDER, tmp_path)

    job = start()
    jobs.wait_until(job, lambda: (tmp_path / "run" / "checkpoint-00000003").exists())
    jobs.kill(job)
    outcome = jobs.finish(start())
    assert outcome.code == 0, outcome.text
    assert "epoch 0 " not in outcome.out
    assert last_line(outcome.out) == last_line(plain.out) != []


IN_ANOTHER_FOLDER = f"""
import os, runpy, sys
os.chdir(sys.argv[1])
runpy.run_path({str(EXAMPLES / "horovod_saved.py")!r}, run_name="__main__")
"""
