# SPDX-License-Identifier: Apache-2.0
"""The program written for adaptdl: killed in its second epoch, gone on with other ranks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.jobs import EXAMPLES, Jobs

if TYPE_CHECKING:
    from pathlib import Path

SAVES_AN_EPOCH = 10
EPOCHS = 4


@pytest.mark.long
def test_program_for_adaptdl_survives_a_kill_with_other_ranks(
    jobs: Jobs, tmp_path: Path
) -> None:
    root, results = tmp_path, tmp_path  # of the run that is looked at

    def start(ranks: int):
        return jobs.start(
            ranks,
            *(EXAMPLES / "adaptdl_train.py", f"--epochs={EPOCHS}", f"--results={results}"),
            MPI_CKPT_DIR=str(root),
        )

    def generation() -> int:
        names = [path.name for path in root.glob("checkpoint-*")]
        return max((int(name.removeprefix("checkpoint-")) for name in names), default=0)

    def lines() -> list[dict]:
        return [json.loads(line) for line in results.read_text().splitlines()]

    for attempt in range(5):  # a busy machine may kill it when that epoch is over
        root, results = tmp_path / f"root-{attempt}", tmp_path / f"results-{attempt}"
        job = start(2)
        jobs.wait_until(job, lambda: generation() > SAVES_AN_EPOCH)
        jobs.kill(job)
        saved = generation()
        if saved < 2 * SAVES_AN_EPOCH:
            break
    assert SAVES_AN_EPOCH < saved < 2 * SAVES_AN_EPOCH
    assert [line["epoch"] for line in lines()] == [0]

    outcome = jobs.finish(start(3))
    assert outcome.code == 0, outcome.text
    # Entered again in the middle of the second epoch, not at its start or the first.
    assert [line["epoch"] for line in lines()] == [0, 1, 2, 3]
    assert [line["samples"] for line in lines()] == [2400] * EPOCHS
    losses = [line["loss"] for line in lines()]
    assert losses[-1] < 0.05
    assert generation() - saved == EPOCHS * SAVES_AN_EPOCH - saved

    # The same sums as without a kill, but for the rounding of other ranks' sums.
    root, results = tmp_path / "whole", tmp_path / "whole.jsonl"
    outcome = jobs.finish(start(1))
    assert outcome.code == 0, outcome.text
    for line, loss in zip(lines(), losses, strict=True):
        assert abs(line["loss"] - loss) < 1e-4 * line["loss"]
