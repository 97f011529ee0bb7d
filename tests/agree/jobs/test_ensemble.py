# SPDX-License-Identifier: Apache-2.0
"""One of two trainings in a job fails: the other goes on to its end."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.jobs import PROGRAMS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs import Jobs

ENSEMBLE = PROGRAMS / "ensemble.py"
STEPS = 6
LONG = [pytest.param(*case, marks=pytest.mark.long) for case in [("exit", 7), ("late", 1)]]


def steps_of(folder: Path, member: int) -> list[int]:
    return sorted(
        int(path.name.removeprefix("checkpoint-"))
        for path in (folder / f"member-{member}").glob("checkpoint-*")
    )


@pytest.mark.parametrize(("how", "code"), [("allreduce", 1), ("save", 1), *LONG])
def test_the_other_member_trains_to_its_end(
    jobs: Jobs, tmp_path: Path, how: str, code: int
) -> None:
    outcome = jobs.run(4, ENSEMBLE, tmp_path, how, STEPS)
    assert outcome.code == code, outcome.text
    assert outcome.out.count("member 1 rank") == 2, outcome.text
    assert "member 0 rank" not in outcome.out
    assert steps_of(tmp_path, 1)[-1] == STEPS
    assert steps_of(tmp_path, 0)[-1] == 2
    if how != "exit":
        heading = r"^rank 1 of 2 on \S+, the member of ranks 0 to 1 of 4:$"
        assert len(re.findall(heading, outcome.err, re.MULTILINE)) == 1, outcome.text
        assert outcome.err.count("\nValueError: no luck in member 0") == 1, outcome.text
    if how == "save":
        told = r"rank 1 on \S+ has failed; its own output has the error"
        assert re.search(told, outcome.err), outcome.text


@pytest.mark.long
def test_all_ranks_of_a_member_fail(jobs: Jobs, tmp_path: Path) -> None:
    outcome = jobs.run(4, ENSEMBLE, tmp_path, "agreed", STEPS)
    # MPICH's launcher kills what is still on its way out behind MPI_Finalize, and says so.
    assert outcome.code in (1, 9), outcome.text
    assert outcome.out.count("member 1 rank") == 2, outcome.text
    assert "given up" not in outcome.err
    assert steps_of(tmp_path, 1)[-1] == STEPS


@pytest.mark.long
def test_both_members_fail(jobs: Jobs, tmp_path: Path) -> None:
    outcome = jobs.run(4, ENSEMBLE, tmp_path, "both", STEPS)
    assert outcome.code == 1, outcome.text
    for member in range(2):
        assert f"\nValueError: no luck in member {member}\n" in outcome.err


@pytest.mark.long
def test_nobody_fails(jobs: Jobs, tmp_path: Path) -> None:
    outcome = jobs.run(4, ENSEMBLE, tmp_path, "none", STEPS)
    assert outcome.code == 0, outcome.text
    assert outcome.out.count("is done") == 4
