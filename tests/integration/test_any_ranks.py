# SPDX-License-Identifier: Apache-2.0
"""Saved with n ranks, restored with m, for all n and m from 1 to 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.jobs import PROGRAMS, Jobs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.launch import Outcome

# With -m mpi4py a failed assertion on one rank ends the job.
PROGRAM = ("-m", "mpi4py", PROGRAMS / "any_ranks.py")


def require_success(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.text
    assert "all as it should be" in outcome.out


@pytest.fixture(scope="module")
def saved(module_jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any-ranks")
    require_success(module_jobs.run(4, *PROGRAM, "save", folder))
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_restore_what_1_2_3_and_4_ranks_saved(
    jobs: Jobs, saved: Path, ranks: int
) -> None:
    require_success(jobs.run(ranks, *PROGRAM, "restore", saved))
