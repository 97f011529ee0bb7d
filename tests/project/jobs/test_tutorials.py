# SPDX-License-Identifier: Apache-2.0
"""The programs of the tutorials: asked to stop, killed, gone on with by other ranks."""

from __future__ import annotations

import re
import signal

import pytest

from tests.jobs import EXAMPLES, PROGRAMS, jobs_of_a_test, signal_to

IN_FOLDER = """
import os, runpy, sys
os.chdir(sys.argv.pop(1))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def start(tmp_path):
    """Starts a program in a folder, where it finds what it has saved there before."""
    with jobs_of_a_test() as jobs:

        def start(name, ranks, *, hold=None, folder="run"):
            there = tmp_path / folder
            there.mkdir(exist_ok=True)
            slow = {} if hold is None else {"TEST_PACE": "0", "TEST_HOLD": str(hold)}
            noting = PROGRAMS / "note_exit.py", there, EXAMPLES / name
            job = jobs.start(ranks, "-c", IN_FOLDER, there, *noting, **slow)
            return jobs, job, there

        yield start


def finish(start, *args, **kwargs):
    jobs, job, _ = start(*args, **kwargs)
    outcome = jobs.finish(job)
    assert outcome.code == 0, outcome.text
    return outcome.out


def test_the_torch_script_stops_and_goes_on_with_other_ranks(start):
    whole = finish(start, "saved_torch.py", 2, folder="whole")
    assert len(re.findall("^epoch", whole, re.MULTILINE)) == 10
    jobs, job, there = start("saved_torch.py", 2, hold=45)
    jobs.wait_until(job, lambda: any((there / "run").glob("checkpoint-*4")))
    signal_to(job, signal.SIGTERM, 1)
    outcome = jobs.finish(job)
    assert outcome.code == 143, outcome.text
    rest = finish(start, "saved_torch.py", 3)
    first = int(re.search(r"^epoch (\d)", rest, re.MULTILINE)[1])
    assert first == 2, "a step was lost, or done twice"

    def last_loss(text):
        return float(re.search(r"^epoch 9  loss (\S+)", text, re.MULTILINE)[1])

    # Another rank has the last batch's loss; the weights are those of the same batches.
    assert last_loss(rest) == pytest.approx(last_loss(whole), rel=0.5)


def test_the_wave_killed_goes_on_with_other_ranks_to_the_same_energy(start):
    whole = finish(start, "wave.py", 2, folder="whole")
    jobs, job, there = start("wave.py", 2, hold=450)
    jobs.wait_until(job, lambda: (there / "wave" / "checkpoint-00000004").exists())
    jobs.kill(job)
    assert finish(start, "wave.py", 3) == whole
    assert finish(start, "wave.py", 1) == whole  # nothing is left to compute
