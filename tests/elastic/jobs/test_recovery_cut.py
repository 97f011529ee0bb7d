# SPDX-License-Identifier: Apache-2.0
"""Ranks with state that is cut over them are lost: their tiles are in another's memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.crash.rank_kills import FLAGS
from tests.hosts import installed_mpi
from tests.jobs import PROGRAMS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs import Jobs

PROGRAM = PROGRAMS / "recovering_cut.py"
pytestmark = pytest.mark.skipif(
    installed_mpi() != "openmpi", reason="only Open MPI survives a rank"
)


def expected() -> list[float]:
    """Return the field of a run without kills."""
    field = [float(row) for row in range(23)]
    for _ in range(30):
        total = sum(field)
        field = [value + total % 7 for value in field]
    return field


def run(jobs: Jobs, folder: Path, kills: str, *more: str) -> list[dict[str, Any]]:
    """Run the program on four ranks; require that nothing of the field was lost."""
    jobs.flags = FLAGS
    log = folder / "log.jsonl"
    outcome = jobs.run(4, PROGRAM, folder / "root", log, kills, *more)
    assert outcome.code in (0, 137), outcome.text
    *starts, end = [json.loads(line) for line in log.read_text().splitlines()]
    assert (end["field"], end["rows"], end["n"]) == (expected(), [*range(23)], 30)
    return [(one["size"], one["step"], one["source"]) for one in starts]


def test_the_ranks_that_are_left_go_on_from_memory(jobs: Jobs, tmp_path: Path) -> None:
    starts = run(jobs, tmp_path, "8:2 14:0")
    assert starts == [(4, 0, "nothing"), (3, 5, "memory"), (2, 12, "memory")]


def test_new_ranks_take_the_tiles_of_the_lost(jobs: Jobs, tmp_path: Path) -> None:
    starts = run(jobs, tmp_path, "8:1 19:3", "replace")
    assert starts == [(4, 0, "nothing"), (4, 5, "memory"), (4, 15, "memory")]


def test_both_ranks_that_held_some_tiles_are_lost(jobs: Jobs, tmp_path: Path) -> None:
    starts = run(jobs, tmp_path, "18:1,2")
    assert starts == [(4, 0, "nothing"), (2, 12, "files")]


@pytest.mark.parametrize(("when", "step"), [("copy", {10}), ("copied", {10, 12})])
def test_a_rank_is_lost_in_the_middle_of_a_copy(
    jobs: Jobs, tmp_path: Path, when: str, step: set[int]
) -> None:
    """Of the fourth copy: the third is whole, or this one."""
    (_, (size, at, source)) = run(jobs, tmp_path, f"{when}:1")
    assert (size, source) == (3, "memory")
    assert at in step
