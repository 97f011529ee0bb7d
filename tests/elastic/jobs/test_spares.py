# SPDX-License-Identifier: Apache-2.0
"""Spare ranks: they wait for nothing but a loss, take the place, and leave with the job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.crash.rank_kills import FLAGS
from tests.elastic.jobs.test_recovery import (
    VALUE,
    long,
    losses,
    recover,
    survives,
    tell,
    ulfm,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs import Jobs

__all__ = ["ulfm"]  # a fixture


@survives
def test_spares_come_first_and_new_ranks_when_they_are_used_up(
    ulfm: Jobs, tmp_path: Path
) -> None:
    calm, lossy = tmp_path / "calm", tmp_path / "lossy"
    calm.mkdir()
    lossy.mkdir()
    undisturbed = recover(ulfm, calm, "--spares", "1", ranks=5)
    kills = ["--replace", "--spares", "2", "--kill", "12:2", "25:0", "38:1,3"]
    story = recover(ulfm, lossy, *kills, ranks=6)
    starts = [event for event in story.lines if event["event"] == "start"]
    assert [(event["size"], event["lost"], event["source"]) for event in starts] == [
        (4, 0, "nothing"), (4, 1, "memory"), (4, 2, "memory"), (4, 4, "memory"),
    ], story.outcome.text  # fmt: skip
    said = story.outcome.err
    assert "lost rank(s) 2 of 6; going on with 4, 0 of them new" in said
    assert said.count("; 1 of them spares until now") == 2
    assert "lost rank(s) 1, 3 of 4; going on with 4, 2 of them new" in said
    # Root is the one that has died second: a spare holds what the others do.
    assert losses(story) == losses(undisturbed)
    assert story.all("digest") == undisturbed.all("digest")
    assert undisturbed.outcome.code == 0, undisturbed.outcome.text
    assert undisturbed.outcome.out.count("weights ") == 4  # not on the spare
    assert story.outcome.code in (0, 137), story.outcome.text


@survives
@pytest.mark.parametrize(
    ("how", "sizes", "spares"),
    [
        ("waiting", [3], [1]),
        ("both", [3, 2], [1, 0]),
        pytest.param("plain", [3, 3], [1, 0], marks=long),
        pytest.param("order", [3, 2], [1, 0], marks=long),
        pytest.param("asked", [3], [1], marks=long),
    ],
)
def test_a_spare_that_is_lost_or_signalled_costs_the_training_nothing(
    ulfm: Jobs, tmp_path: Path, how: str, sizes: list[int], spares: list[int]
) -> None:
    story = tell(ulfm, tmp_path, how, "1", ranks=4)
    assert story.all("size") == sizes, story.outcome.text
    assert story.all("spares") == spares
    assert story.all("value") == [VALUE]
    assert story.outcome.code == 0, story.outcome.text
    # It would wait for the dead there in one job of ten.
    finalizes = "on the way to MPI_Finalize" in story.outcome.out
    assert finalizes == (how == "asked"), story.outcome.text


@survives
def test_a_training_that_fails_after_the_loss_of_a_spare_ends(
    ulfm: Jobs, tmp_path: Path
) -> None:
    story = tell(ulfm, tmp_path, "waiting_then_errors", "2", ranks=5)
    assert story.outcome.code == 1, story.outcome.text
    assert story.outcome.err.count("ValueError: the same everywhere") == 3
    assert story.all("value") == []
    assert "on the way to MPI_Finalize" not in story.outcome.out


@survives
@pytest.mark.parametrize("how", ["errors", pytest.param("error", marks=long)])
def test_a_spare_leaves_a_training_that_fails(ulfm: Jobs, tmp_path: Path, how: str) -> None:
    story = tell(ulfm, tmp_path, how, "1", ranks=3)
    assert story.outcome.code == 1, story.outcome.text
    assert story.all("value") == []


def test_spares_leave_where_a_lost_rank_ends_the_job(jobs: Jobs, tmp_path: Path) -> None:
    # Open MPI without --with-ft, MPICH always.
    story = tell(jobs, tmp_path, "none", "1", ranks=3)
    assert story.outcome.code == 0, story.outcome.text
    assert story.all("size") == [2]
    assert story.all("value") == [VALUE]
    assert story.outcome.out.count("returned") == 2


@pytest.mark.parametrize("ft", [pytest.param(True, marks=survives), False])
def test_a_job_of_spares_alone_is_refused(jobs: Jobs, tmp_path: Path, ft: bool) -> None:
    jobs.flags = FLAGS if ft else ()
    (tmp_path / "log.jsonl").touch()
    story = tell(jobs, tmp_path, "none", "2", ranks=2)
    assert story.outcome.code == 1, story.outcome.text
    assert "spares=2 of a job of 2 ranks" in story.outcome.err
