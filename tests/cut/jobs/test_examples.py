# SPDX-License-Identifier: Apache-2.0
"""The examples of state that is cut over ranks: killed, gone on with by other numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.jobs import EXAMPLES, PROGRAMS, Jobs, logged

if TYPE_CHECKING:
    from pathlib import Path

RANKS = (3, 4, 1, 2)
STEPS, INTERVAL = 400, 25


def generations(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("checkpoint-*"))


def run_broken(jobs: Jobs, folder: Path, program: str, *options: object) -> None:
    """Run a program on one number of ranks after the other, each killed but the last."""
    checkpoints = folder / "checkpoints"
    command = (EXAMPLES / program, f"--checkpoints={checkpoints}", *options)
    for ranks in RANKS[:-1]:
        before = generations(checkpoints)
        slowly = (PROGRAMS / "note_exit.py", folder)
        job = jobs.start(ranks, *slowly, *command, TEST_PACE="0.02", TEST_HOLD="999")
        jobs.wait_until(job, lambda: generations(checkpoints) != before)  # noqa: B023
        jobs.kill(job)
    outcome = jobs.run(RANKS[-1], *command)
    assert outcome.code == 0, outcome.text


@pytest.mark.parametrize("program", ["heat.py", "particles.py"])
def test_killed_it_ends_bit_equal_on_any_ranks(
    jobs: Jobs, tmp_path: Path, program: str
) -> None:
    options = (f"--steps={STEPS}", f"--interval={INTERVAL}")
    whole, broken = tmp_path / "whole.npy", tmp_path / "broken.npy"
    outcome = jobs.run(
        1,
        *(EXAMPLES / program, f"--checkpoints={tmp_path / 'whole'}"),
        *(*options, f"--result={whole}"),
    )
    assert outcome.code == 0, outcome.text
    run_broken(jobs, tmp_path, program, *options, f"--result={broken}")
    assert np.load(broken).tobytes() == np.load(whole).tobytes()


@pytest.mark.long
def test_a_network_cut_over_ranks_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    options = ("--steps=60", "--interval=10", f"--log={log}")
    run_broken(jobs, tmp_path, "fsdp_train.py", *options)
    starts = [event for event in logged(log) if event["event"] == "start"]
    assert [start["ranks"] for start in starts] == list(RANKS)
    assert all(one["step"] < other["step"] for one, other in pairwise(starts))
    losses = [event["loss"] for event in logged(log) if event["event"] == "step"]
    assert losses[-1] < losses[0] / 2
