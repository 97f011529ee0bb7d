# SPDX-License-Identifier: Apache-2.0
"""Saved with n ranks, restored with m, and with n again, for all n and m up to a number."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.jobs import PROGRAMS
from tests.launch import run_job

# With -m mpi4py a failed assertion on one rank ends the job.
PROGRAM = ("-m", "mpi4py", str(PROGRAMS / "any_ranks.py"))
# In memory, where the fsyncs of dozens of saves cost nothing.
SPOOL = Path("/dev/shm")
PATIENCE_SECONDS = 600


@pytest.mark.parametrize("most", [4, pytest.param(8, marks=pytest.mark.long)])
def test_any_number_of_ranks_restores_what_any_number_has_saved(most: int) -> None:
    with tempfile.TemporaryDirectory(dir=SPOOL if SPOOL.is_dir() else None) as folder:
        outcome = run_job(most, [*PROGRAM, folder], timeout=PATIENCE_SECONDS)
    assert outcome.code == 0, outcome.text
    assert "all as it should be" in outcome.out
