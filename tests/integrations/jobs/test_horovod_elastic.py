# SPDX-License-Identifier: Apache-2.0
"""The example in the manner of Horovod elastic, killed and gone on with.

Without Horovod here; tests/integrations/horovod does the same beside a real one.
"""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.draws import SEED
from tests.jobs import EXAMPLES, PROGRAMS, Jobs, logged, signal_to

if TYPE_CHECKING:
    from pathlib import Path
    from subprocess import Popen

    from tests.launch import Outcome

EPOCHS = 3
BATCHES = 30 * EPOCHS  # with two ranks


class Training:
    """The example in a folder of its own: started, watched, started again."""

    def __init__(self, jobs: Jobs, folder: Path) -> None:
        self.jobs = jobs
        self.folder = folder
        self.log = folder / "log.jsonl"

    def start(self, ranks: int, **env: str) -> Popen[str]:
        program = EXAMPLES / "horovod_elastic.py"
        places = f"--checkpoints={self.folder / 'checkpoints'}", f"--log={self.log}"
        options = f"--epochs={EPOCHS}", "--interval=5"
        note = PROGRAMS / "note_exit.py"
        command = (note, self.folder, program, *places, *options)
        return self.jobs.start(ranks, *command, **env)

    def run(self, ranks: int) -> Outcome:
        return self.jobs.finish(self.start(ranks))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in logged(self.log) if event["event"] == kind]

    def start_until(self, ranks: int, batch: int) -> Popen[str]:
        """Return a job that has committed a batch, and is held there to be caught."""
        job = self.start(ranks, TEST_PACE="0.03", TEST_HOLD=str(batch))
        self.jobs.wait_until(
            job, lambda: any(event["batch"] >= batch for event in self.events("commit"))
        )
        return job


@pytest.fixture(scope="module")
def digest(module_jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fingerprint of the weights of a training that nobody has disturbed."""
    training = Training(module_jobs, tmp_path_factory.mktemp("whole"))
    outcome = training.run(2)
    assert outcome.code == 0, outcome.text
    (end,) = training.events("end")
    assert end["batch"] == end["losses"] == BATCHES
    return str(end["digest"])


@pytest.mark.long
def test_killed_at_random_points_it_ends_with_the_same_weights(
    jobs: Jobs, tmp_path: Path, digest: str
) -> None:
    training = Training(jobs, tmp_path)
    points = random.Random(SEED)
    reached = 0
    for whole in (True, False):
        job = training.start_until(2, reached + points.randrange(12, 30))
        if whole:
            jobs.kill(job)
        else:
            # The launcher ends the job for one lost rank.
            signal_to(job, signal.SIGKILL, points.randrange(2))
            outcome = jobs.finish(job)
            assert outcome.code not in (0, 124), (SEED, outcome.text)
        reached = training.events("commit")[-1]["batch"]
    outcome = training.run(2)
    assert outcome.code == 0, (SEED, outcome.text)
    starts = [event["batch"] for event in training.events("start")]
    assert starts == sorted(starts), SEED
    assert starts[0] == 0 < starts[-1], SEED
    (end,) = training.events("end")
    assert (end["digest"], end["batch"], end["losses"]) == (digest, BATCHES, BATCHES), SEED


def test_asked_to_stop_it_loses_nothing_and_goes_on_with_another_number_of_ranks(
    jobs: Jobs, tmp_path: Path
) -> None:
    training = Training(jobs, tmp_path)
    job = training.start_until(2, 35)  # an epoch is over at 30 and at 60
    signal_to(job, signal.SIGTERM, 1)
    outcome = jobs.finish(job)
    assert outcome.code == 143, outcome.text
    codes = {path.name: path.read_text() for path in tmp_path.glob("exit-*")}
    assert codes == {"exit-0": "143", "exit-1": "143"}
    done = training.events("commit")[-1]["batch"] + 1  # the last commit left by the code
    outcome = training.run(3)
    assert outcome.code == 0, outcome.text
    begin = training.events("start")[-1]
    assert (begin["batch"], begin["epoch"], begin["ranks"]) == (done, done // 30, 3)
    # What was left of that epoch, then whole ones of 20 batches.
    left = -(-(600 - done % 30 * 20) // 30)
    (end,) = training.events("end")
    assert end["batch"] == done + left + 20 * (EPOCHS - done // 30 - 1)
