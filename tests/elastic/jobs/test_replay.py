# SPDX-License-Identifier: Apache-2.0
"""What a restart runs again reads what was read before, however often."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.jobs import PROGRAMS, Jobs

if TYPE_CHECKING:
    from pathlib import Path


def test_sums_cleared_by_the_program_are_replayed_whole(jobs: Jobs, tmp_path: Path) -> None:
    program = ("-m", "mpi4py", PROGRAMS / "replayed_sums.py", tmp_path / "root")
    outcome = jobs.run(2, *program)
    assert outcome.code == 0, outcome.text
    assert outcome.out.count("the same each time") == 2
