# SPDX-License-Identifier: Apache-2.0
"""Power cuts while newer generations are set aside, and while they are brought back."""

from __future__ import annotations

import random
import shutil

import pytest

from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.directory.rollback import bring_back, set_newer_aside
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.commands import run as run_command
from tests.crash.crashes import (
    ROOT,
    Run,
    Scenario,
    judge_crashes,
    quiet_scratch,
    record,
    saved_image,
)
from tests.crash.replay import crash_images, read_image, write_image
from tests.crash.world import empty, scratch
from tests.draws import SEED

GOES_BACK_TO = 2


def recorded(*words: object, base=None) -> Scenario:
    saved, saves = saved_image([1, 2, 3, 4])

    def program(run: Run) -> None:
        assert run_command("rollback", run.root, *words).exit_code == 0

    # Whatever a crash leaves, a job goes on from generation 2 or a newer one.
    scenario = Scenario("rollback", base or saved, saves=saves, acked=GOES_BACK_TO - 1)
    return record(scenario, program)


def undoing() -> Scenario:
    saved, _ = saved_image([1, 2, 3, 4])
    sandbox = scratch()
    try:
        write_image(saved, sandbox)
        set_newer_aside(sandbox / ROOT, GOES_BACK_TO)
        base = read_image(sandbox)
    finally:
        shutil.rmtree(sandbox)
    return recorded("--undo", base=base)


SCENARIOS = {"rollback": lambda: recorded(GOES_BACK_TO), "undo": undoing}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_job_goes_on_from_every_crash_state(name):
    result = judge_crashes(SCENARIOS[name](), SEED, samples=30)
    assert not result.bad, str(result)
    assert result.states >= 4


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_in_any_crash_state(name):
    scenario = SCENARIOS[name]()
    with quiet_scratch() as sandbox:
        for _, _, image in crash_images(
            scenario.base, scenario.ops, random.Random(SEED), samples=30
        ):
            empty(sandbox)
            write_image(image, sandbox)
            root = sandbox / ROOT
            assert recovery.survey(root).next_generation == 5
            # Called again, either goes on to its end.
            set_newer_aside(root, GOES_BACK_TO)
            assert recovery.survey(root).generations == (2, 1)
            assert recovery.survey(root).next_generation == 5
            assert bring_back(root) == (3, 4)
            assert recovery.survey(root).generations == (4, 3, 2, 1)
            for path in root.glob("checkpoint-*"):
                with GenerationReader(path) as reader:
                    verify(reader)
