# SPDX-License-Identifier: Apache-2.0
"""The example of a training: stopped by signals, killed, gone on with."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.jobs import Jobs, Training, signal_to

if TYPE_CHECKING:
    from pathlib import Path

EPOCHS = 10
STEPS = 24 * EPOCHS
SAMPLES = dict.fromkeys(range(EPOCHS), 1500)


@pytest.fixture(scope="module")
def uninterrupted(module_jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(module_jobs, tmp_path_factory.mktemp("whole"), epochs=EPOCHS)
    outcome = training.run(2)
    assert outcome.code == 0, outcome.text
    return training


def test_uninterrupted_training_learns(uninterrupted: Training) -> None:
    assert uninterrupted.step == STEPS
    assert uninterrupted.samples() == SAMPLES
    assert uninterrupted.events("epoch")[-1]["accuracy"] > 0.95


def test_signal_stops_all_and_the_resumed_run_ends_bit_equal(
    jobs: Jobs, tmp_path: Path, uninterrupted: Training
) -> None:
    """Other signals, to other ranks and to mpirun, are test_preemption's."""
    training = Training(jobs, tmp_path, epochs=EPOCHS)
    job = training.start_until(2, step=40)
    signal_to(job, signal.SIGTERM, 1)
    outcome = jobs.finish(job)
    assert outcome.code == 143, outcome.text
    assert training.exits() == {0: "143", 1: "143"}
    (stop,) = training.events("stop")
    assert 40 <= stop["step"] < STEPS

    outcome = training.run(2)
    assert outcome.code == 0, outcome.text
    assert training.exits() == {0: "0", 1: "0"}
    resumed = training.events("start")[-1]
    assert resumed["step"] == stop["step"], "a step was lost, or done twice"
    assert training.samples() == SAMPLES
    assert training.digest == uninterrupted.digest


def test_sigkill_of_the_job_then_other_ranks_go_on(jobs: Jobs, tmp_path: Path) -> None:
    training = Training(jobs, tmp_path, epochs=4)
    for ranks, step in [(2, 30), (1, 50)]:
        jobs.kill(training.start_until(ranks, step))
    outcome = training.run(3)
    assert outcome.code == 0, outcome.text
    first, second, third = training.events("start")
    assert first["generation"] is None
    assert 30 <= second["step"] <= third["step"]
    assert second["step"] % 10 == third["step"] % 10 == 0, "not from an interval's save"
    assert training.samples() == dict.fromkeys(range(4), 1500)
    assert training.step == 4 * 24


def test_finished_training_started_again_does_nothing(
    jobs: Jobs, uninterrupted: Training
) -> None:
    digest, steps = uninterrupted.digest, len(uninterrupted.events("step"))
    again = Training(jobs, uninterrupted.folder, epochs=EPOCHS)
    again.log = uninterrupted.folder / "again.jsonl"
    outcome = again.run(1)
    assert outcome.code == 0, outcome.text
    assert again.digest == digest
    assert again.events("step") == []
    assert len(uninterrupted.events("step")) == steps
