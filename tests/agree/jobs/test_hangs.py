# SPDX-License-Identifier: Apache-2.0
"""A rank that does not come: the others say who and where, and the job ends."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest

from tests.jobs import PROGRAMS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs import Jobs

DEADLINE_SECONDS = 6


def hang(
    jobs: Jobs,
    folder: Path,
    how: str,
    *,
    ranks: int,
    absent: int,
    deadline: float = DEADLINE_SECONDS,
) -> str:
    """Run a job one rank of which hangs; return what was said."""
    program = PROGRAMS / "hanging.py"
    outcome = jobs.run(ranks, program, folder, how, absent, deadline)
    assert outcome.code not in (0, 124), outcome.text
    text = outcome.err
    named = rf"CollectiveError: [^\n]+: rank {absent} on \S+ of {ranks} did not arrive"
    assert re.search(named, text), outcome.text
    last_met = r"all ranks last met \d+ s ago \(for: [^\n]+\)"
    assert re.search(rf"rank {absent} on \S+: process \d+ .*; {last_met}", text), text
    # Where the second save could not end; the FIFO stands in the way of the first.
    generations = [path.name for path in (folder / "root").glob("checkpoint-*")]
    assert generations == ([] if how == "fifo" else ["checkpoint-00000001"])
    return text


@pytest.mark.parametrize(
    ("how", "where"),
    [("stop", "is stopped by a signal"), ("compute", "is running other code")],
)
def test_a_rank_outside_of_the_library(
    jobs: Jobs, tmp_path: Path, how: str, where: str
) -> None:
    assert where in hang(jobs, tmp_path, how, ranks=3, absent=1)


def test_a_rank_that_dies_while_it_is_busy(jobs: Jobs, tmp_path: Path) -> None:
    text = hang(jobs, tmp_path, "busy", ranks=3, absent=1, deadline=3)
    said = r"process \d+ has died; it has been busy for \d+ s: writing VTK; all ranks last"
    assert re.search(said, text), text


def test_a_rank_that_reads_what_nobody_writes(jobs: Jobs, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    text = hang(jobs, tmp_path, "fifo", ranks=4, absent=2)
    assert re.search(r"rank 2 on \S+: process \d+ waits", text)
    watched = r"WARNING rank 2 of 4 on \S+, saving: no progress for [\d.]+ s, phase sync, "
    assert re.search(watched, text), text
    place = r"MainThread is at(\n    \S+, in \w+)+\n    \S+/hanging.py:\d+, in sync\n"
    assert re.search(place, text), text
    assert text.count(", phase sync, ") == 1, "nobody else stands still by itself"


@pytest.mark.parametrize("how", ["fsync", "behind"])
def test_root_that_hangs_in_an_fsync(jobs: Jobs, tmp_path: Path, how: str) -> None:
    text = hang(jobs, tmp_path, how, ranks=2, absent=0)
    watched = (
        r"WARNING rank 0 of 2 on \S+, saving: no progress for [\d.]+ s, phase write, "
        r"files: \S+/root/\.partial-00000002-\w+/pipe\.bin\n"
    )
    assert re.search(watched, text), text
    thread = {"fsync": "MainThread", "behind": "mpi_ckpt-save_0"}[how]
    place = rf"{thread} is at(\n    \S+, in \w+)+\n    \S+/hanging.py:\d+, in hang\n"
    assert re.search(place, text), text
