# SPDX-License-Identifier: Apache-2.0
"""Data-loader workers of a rank: no ranks themselves, and ahead of what is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.jobs import PROGRAMS, Jobs

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_terminated_worker_is_not_noticed(jobs: Jobs, tmp_path: Path, method: str) -> None:
    program = ("-m", "mpi4py", PROGRAMS / "loader_worker.py", tmp_path / "root", method)
    outcome = jobs.run(2, "-W", "default", *program)
    assert outcome.code == 0, outcome.text
    assert outcome.out.count("went on") == 2
    # Python's own tracker of semaphores may complain of what a terminated worker left or of
    # what torch's handler of SIGCHLD interrupted: neither is ours, and both are harmless.
    lines = outcome.err.splitlines()
    others = [line for line in lines if "resource_tracker" not in line]
    assert [line for line in others if "warnings.warn(" not in line] == []


def test_resumed_epoch_has_each_sample_once_whatever_workers_fetch_ahead(
    jobs: Jobs, tmp_path: Path
) -> None:
    program = ("-m", "mpi4py", PROGRAMS / "loader_resume.py", tmp_path / "root")
    outcome = jobs.run(3, *program)
    assert outcome.code == 0, outcome.text
    assert "each sample once" in outcome.out
