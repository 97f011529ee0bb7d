# SPDX-License-Identifier: Apache-2.0
"""The examples of torch.distributed and of Lightning: killed, stopped, gone on with."""

from __future__ import annotations

import json
import os
import signal
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from tests.jobs import (
    PATIENCE_SECONDS,
    PROGRAMS,
    Jobs,
    Training,
    process_of,
    signal_to,
)

if TYPE_CHECKING:
    from pathlib import Path

EPOCHS = 3
STEPS = 24 * EPOCHS
INTERVAL = 10

needs_lightning = pytest.mark.skipif(
    find_spec("lightning") is None, reason="PyTorch Lightning is not installed"
)
EXAMPLES = [
    pytest.param("ddp_train.py", id="torch.distributed"),
    pytest.param("lightning_train.py", id="Lightning", marks=needs_lightning),
]


@pytest.mark.long
@pytest.mark.parametrize("program", EXAMPLES)
def test_killed_and_stopped_it_ends_bit_equal(
    jobs: Jobs, tmp_path: Path, program: str
) -> None:
    def training(name: str) -> Training:
        folder = tmp_path / name
        folder.mkdir()
        return Training(jobs, folder, epochs=EPOCHS, program=program, interval=INTERVAL)

    whole = training("whole")
    outcome = whole.run(2)
    assert outcome.code == 0, outcome.text

    broken = training("broken")
    job = broken.start_until(2, step=14)
    os.kill(process_of(job, 1), signal.SIGKILL)
    outcome = jobs.finish(job)
    assert outcome.code not in (0, 143), outcome.text

    job = broken.start_until(2, step=41)
    signal_to(job, signal.SIGTERM, 1)
    outcome = jobs.finish(job)
    assert outcome.code == 143, outcome.text
    assert broken.exits() == {0: "143", 1: "143"}
    stopped = broken.step

    outcome = broken.run(2)
    assert outcome.code == 0, outcome.text
    killed, second, third = (start["step"] for start in broken.events("start"))
    assert killed == 0
    assert second > 0
    assert second % INTERVAL == 0, "not from an interval's save"
    assert third == stopped, "a step was lost, or done twice"
    assert broken.step == whole.step == STEPS
    assert broken.digest == whole.digest


@pytest.mark.long
@needs_lightning
def test_lightning_goes_on_with_another_number_of_ranks(jobs: Jobs, tmp_path: Path) -> None:
    program = "lightning_train.py"
    training = Training(jobs, tmp_path, epochs=2, program=program, interval=INTERVAL)
    jobs.kill(training.start_until(2, step=15))
    reached = training.step
    outcome = training.run(1)
    assert outcome.code == 0, outcome.text
    first, second = training.events("start")
    assert (first["ranks"], second["ranks"]) == (2, 1)
    # One more may have been saved than logged.
    saved = reached // INTERVAL * INTERVAL
    assert second["step"] in (saved, saved + INTERVAL)
    assert training.step == 48
    # Every step after the restart once, and none before.
    steps = [event["step"] for event in training.events("step")][-(48 - second["step"]) :]
    assert steps == list(range(second["step"] + 1, 49))


@pytest.fixture(scope="module")
def cases(module_jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cases")
    job = module_jobs.start(2, PROGRAMS / "lightning_cases.py", folder)
    outcome = module_jobs.finish(job, patience=4 * PATIENCE_SECONDS)  # a dozen trainings
    assert outcome.code == 0, outcome.text
    of_root, of_other = json.loads((folder / "results.json").read_text())
    assert of_root == of_other
    return of_root


@needs_lightning
@pytest.mark.parametrize("after", ["3", "5", "7"], ids=lambda n: f"after-{n}-of-10")
def test_lightning_resumes_at_any_place_of_an_epoch(cases, after: str) -> None:
    weights_equal, batches_equal, loaded = cases["resumed"][after]
    assert weights_equal
    assert batches_equal
    assert loaded == {"batches": int(after), "tuple": [1, 2]}, "hooks had another value"


@needs_lightning
@pytest.mark.parametrize("case", ["accumulate", "workers"])
def test_lightning_resumes_bit_equal_with(cases, case: str) -> None:
    assert cases[case] == [True, True]


@needs_lightning
def test_replicas_of_lightning_that_differ_are_made_equal(cases) -> None:
    # The ranks' results are compared where they are read.
    assert [len(event) for event in cases["drift"]] == [3, 3, 1, 1]


@needs_lightning
def test_generation_wins_over_the_path_given_to_fit(cases) -> None:
    assert cases["wins_over_path"] == [5, True, True]


@needs_lightning
@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("hyper_parameter", "StageError", "hyper_parameters/of is of type torch.nn"),
        ("hyper_parameter", "StageError", "save_hyperparameters(ignore="),
        ("other_model", "StateMismatchError", "size mismatch for layers.0.weight"),
        ("other_batch_size", "StateMismatchError", "2 batches of epoch 0, and 3 are left"),
        (
            "devices",
            "LaunchError",
            "runs 2 ranks, but is set up for 1 nodes with 3 devices",
        ),
    ],
)
def test_lightning_refuses_on_all_ranks(cases, case: str, kind: str, text: str) -> None:
    assert cases[case][0] == kind
    assert text in cases[case][1]


@needs_lightning
def test_checkpoints_of_lightning_itself_are_generations(cases) -> None:
    first, second, loaded, batches = cases["plugin"]
    assert first == ["epoch=0-step=5.ckpt", "last.ckpt"]
    assert second == ["epoch=1-step=10.ckpt", "last.ckpt"], "the older is still there"
    assert loaded == {"batches": 5, "tuple": [1, 2]}
    assert batches == 5
