# SPDX-License-Identifier: Apache-2.0
"""SIGSTOP and SIGCONT of a rank in a save or a restore, and an fsync that takes long."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.crash.moments import MOMENTS
from tests.draws import COUNTS, STRESS
from tests.jobs import jobs_of_a_test

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.jobs import Jobs
    from tests.launch import Outcome

PROGRAM = Path(__file__).parent / "programs" / "stopped.py"
RANKS = 3
# What a job of a test may need on a busy machine, and a wait that soon is over.
PATIENT, SHORT = 50, 3

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(36000 if STRESS else 300)]

DRAWN = [
    ("save", "change", 6, "inside", 0, SHORT),
    ("restore", "collective", 4, "before", 2, PATIENT),
]
MORE = [
    ("save", "collective", 5, "inside", 1, PATIENT),
    ("restore", "collective", 4, "before", 2, SHORT),
    ("save", "change", 9, "after", 0, PATIENT),
    ("save", "collective", 2, "after", 2, SHORT),
    ("save", "collective", 4, "before", 0, SHORT),
    ("restore", "collective", 3, "inside", 0, SHORT),
    ("restore", "collective", 6, "after", 1, PATIENT),
]


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    with jobs_of_a_test() as jobs:
        yield jobs


def start(jobs: Jobs, folder: Path, *arguments: object):
    for path in folder.glob("*-?"):
        path.unlink()
    (folder / "stopped").unlink(missing_ok=True)
    return jobs.start(RANKS, PROGRAM, folder, *arguments)


def noted(folder: Path, what: str) -> dict[int, str]:
    return {int(path.name[-1]): path.read_text() for path in folder.glob(f"{what}-?")}


def stop_at(jobs: Jobs, folder: Path, *arguments: object) -> bool:
    """Run a job a rank of which stops; return whether it came to that."""
    *_, rank, deadline = arguments
    job = start(jobs, folder, *arguments)
    everybody = set(range(RANKS))
    stopped = folder / "stopped"
    jobs.wait_until(
        job, lambda: stopped.exists() or set(noted(folder, "done")) == everybody
    )
    if not stopped.exists():
        assert jobs.finish(job).code == 0
        return False
    process = int(stopped.read_text())
    if deadline == PATIENT:
        time.sleep(0.5)
    else:
        others = everybody - {rank}
        jobs.wait_until(job, lambda: others <= set(noted(folder, "error")))
    os.kill(process, signal.SIGCONT)
    outcome = jobs.finish(job)
    judge(folder, outcome, rank, process, is_late=deadline != PATIENT)
    return True


def judge(
    folder: Path, outcome: Outcome, rank: int, process: int, *, is_late: bool
) -> None:
    """Require what is promised of a rank that was stopped."""
    if not is_late:
        assert outcome.code == 0, outcome.text
        assert set(noted(folder, "done")) == set(range(RANKS))
        return
    assert outcome.code not in (0, 124), outcome.text
    errors = noted(folder, "error")
    assert set(errors) == set(range(RANKS)), outcome.text
    for other, text in errors.items():
        if other == rank:
            assert "the others gave up waiting for this rank" in text
        else:
            assert re.search(rf"rank {rank} on \S+ of {RANKS} did not arrive within", text)
            seen = rf"rank {rank} on \S+: process {process} is stopped by a signal"
            assert re.search(seen, text), text


def all_is_right(jobs: Jobs, folder: Path) -> None:
    """Require that the next job finds what was saved, whole, and saves again."""
    job = start(jobs, folder, "save", "nothing", 0, "before", 0, PATIENT)
    outcome = jobs.finish(job)
    assert outcome.code == 0, outcome.text
    assert len(set(noted(folder, "done").values())) == 1


@pytest.mark.parametrize(
    "drawn", [*DRAWN, *(pytest.param(case, marks=pytest.mark.long) for case in MORE)]
)
def test_a_rank_that_is_stopped_for_a_while(jobs, tmp_path, drawn):
    assert stop_at(jobs, tmp_path, *drawn), "the moment does not come any more"
    COUNTS["stops"] += 1
    all_is_right(jobs, tmp_path)


@pytest.mark.long
@pytest.mark.skipif(not STRESS, reason="takes hours: MPI_CKPT_TEST_STRESS=1 tries all")
@pytest.mark.parametrize("deadline", [PATIENT, SHORT])
@pytest.mark.parametrize(
    ("phase", "kind", "rank"),
    [
        ("save", "change", 0),
        ("restore", "change", 0),
        *itertools.product(("save", "restore"), ("collective",), range(RANKS)),
    ],
)
def test_a_stop_at_every_moment(jobs, tmp_path, phase, kind, rank, deadline):
    for number in itertools.count(1):
        hits = [
            stop_at(jobs, tmp_path, phase, kind, number, when, rank, deadline)
            for when in MOMENTS
        ]
        COUNTS["stops"] += sum(hits)
        if not any(hits):
            break
        all_is_right(jobs, tmp_path)


@pytest.mark.parametrize(
    ("seconds", "deadline"), [(2.5, 15), pytest.param(30, 200, marks=pytest.mark.long)]
)
def test_a_slow_fsync_is_no_failure(jobs, tmp_path, seconds, deadline):
    job = start(jobs, tmp_path, "save", "slow", seconds, "before", 0, deadline)
    outcome = jobs.finish(job)
    assert outcome.code == 0, outcome.text
    told = [line for line in outcome.err.splitlines() if re.match(r"[A-Z]+ ", line)]
    watched = [line for line in told if ": no progress for " in line]
    assert len(watched) == 1, outcome.text
    place = r"phase write, files: \S+/ckpt/\.partial-\d+-\w+/\S+"
    assert re.search(rf"WARNING rank 0 of 3 on \S+, saving: .* {place}", watched[0])
    # Who waits for half a minute says so, whatever for.
    waiting = [line for line in told if "has waited 30 s for other ranks" in line]
    assert set(told) == {*watched, *waiting}
    assert seconds >= 30 or not waiting
