# SPDX-License-Identifier: Apache-2.0
"""Every way to leave a job: by an error of one rank, of all, and with a save pending."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from safetensors.numpy import load_file

from tests.crash.rank_kills import FLAGS
from tests.hosts import installed_mpi
from tests.jobs import PROGRAMS
from tests.waiting import limit

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs import Jobs
    from tests.launch import Outcome

LEAVING = PROGRAMS / "leaving.py"
BEHIND = "asynchronous=True"
# Many times what it takes, and less than the patience with a hang.
SOON_SECONDS = limit(100)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def headings(outcome: Outcome) -> list[int]:
    """Return the ranks whose tracebacks are headed by who they are."""
    found = re.findall(r"rank (\d) of \d on \S+:$", outcome.err, re.MULTILINE)
    return sorted(map(int, found))


def generations(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("checkpoint-*"))


def saved_value(root: Path, generation: int) -> float:
    folder = root / f"checkpoint-{generation:08d}"
    (array,) = load_file(folder / "rank-00000.safetensors").values()
    assert (array == array[0]).all()
    return array[0]


@pytest.mark.parametrize(
    ("ranks", "failing", "how"),
    [
        (2, 1, "raise_inside"),
        (2, 0, "raise_outside"),
        (3, 1, "raise_after"),
        (4, 3, "raise_outside"),
    ],
)
def test_an_error_on_one_rank_ends_the_job(
    jobs: Jobs, root: Path, ranks: int, failing: int, how: str
) -> None:
    outcome = jobs.run(ranks, LEAVING, root, how, failing)
    assert outcome.code == 1, outcome.text
    assert outcome.seconds < SOON_SECONDS
    assert f"rank {failing} of {ranks} on " in outcome.err
    error = {"raise_after": "RuntimeError: cannot go on"}
    expected = error.get(how, f"ValueError: bad luck of rank {failing}")
    assert f"\n{expected}\n" in outcome.err
    assert "the job is aborted with code 1" in outcome.err
    assert generations(root) == ["checkpoint-00000001"]


@pytest.mark.skipif(installed_mpi() != "openmpi", reason="only Open MPI survives a rank")
@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_rank_ends_a_job_that_could_go_on_and_does_not(
    jobs: Jobs, root: Path, lost: int
) -> None:
    """MPI_Finalize might wait for it without end."""
    jobs.flags = FLAGS
    outcome = jobs.run(3, LEAVING, root, "be_lost", lost)
    assert outcome.code == 1, outcome.text
    assert outcome.seconds < SOON_SECONDS
    assert "MPI_ERR_PROC_FAILED" in outcome.err
    assert "published generations are untouched" in outcome.err
    assert "the job is aborted with code 1" in outcome.err
    assert "cannot be received" not in outcome.err, outcome.text
    assert generations(root) == ["checkpoint-00000001"]


def test_what_a_rank_says_last_is_heard(jobs: Jobs, root: Path) -> None:
    """MPICH's launcher drops at an abort what it has not passed on by then."""
    outcome = jobs.run(3, LEAVING, root, "raise_unheard", 1)
    assert outcome.code == 1, outcome.text
    assert "the job is aborted with code 1" in outcome.err, outcome.text


def test_an_error_of_all_ranks_is_told_once_and_aborts_nothing(
    jobs: Jobs, root: Path
) -> None:
    outcome = jobs.run(4, LEAVING, root, "agreed_error", "all")
    assert outcome.code == 1, outcome.text
    assert outcome.err.count("WriteError: saving failed; published generations are") == 1
    assert outcome.err.count("WriteError, reported in full by rank 0") == 3
    assert set(headings(outcome)) == {0}
    assert "aborted" not in outcome.err
    assert generations(root) == ["checkpoint-00000001"]


@pytest.mark.parametrize("who", ["1", "all"])
def test_sys_exit_with_an_error_code(jobs: Jobs, root: Path, who: str) -> None:
    outcome = jobs.run(3, LEAVING, root, "exit_inside", who)
    assert outcome.code == 7, outcome.text
    assert ("aborted with code 7" in outcome.err) == (who == "1"), outcome.text


def test_sys_exit_of_one_rank_that_is_done_keeps_nobody(jobs: Jobs, root: Path) -> None:
    """The others close the manager, which is collective, without it."""
    outcome = jobs.run(3, LEAVING, root, "exit_early", 1)
    assert outcome.code == 0, outcome.text
    assert outcome.seconds < limit(25), outcome.text
    assert outcome.err == "", outcome.text


def test_printing_by_the_hook_ends_nothing(jobs: Jobs, root: Path) -> None:
    outcome = jobs.run(2, LEAVING, root, "print_only", "all")
    assert outcome.code == 0, outcome.text
    assert outcome.out.count("went on") == 2
    # Python writes a line in pieces, between which the launcher may put those of rank 0.
    assert "bad luck of rank 1" in outcome.err


def test_under_mpi4py_that_ends_the_job(jobs: Jobs, root: Path) -> None:
    outcome = jobs.run(2, "-m", "mpi4py", LEAVING, root, "raise_inside", 1)
    assert outcome.code == 1, outcome.text
    assert "ValueError: bad luck of rank 1" in outcome.err
    assert headings(outcome) == []


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_save_pending_at_the_end_is_finished(jobs: Jobs, root: Path, ranks: int) -> None:
    outcome = jobs.run(ranks, LEAVING, root, "pending_exit", "all", BEHIND)
    assert outcome.code == 0, outcome.text
    left = "the save of step 0 was left without wait() or close(); generation 2 is durable"
    assert outcome.err.count(left) == 1, outcome.text
    assert saved_value(root, 2) == 2
    if ranks == 2:
        again = jobs.run(1, LEAVING, root, "restore", "all")
        assert "generation 2 of 2 2" in again.out, again.text


def test_a_save_pending_at_the_end_that_fails_says_so(jobs: Jobs, root: Path) -> None:
    outcome = jobs.run(2, LEAVING, root, "pending_exit_failing", "all", BEHIND)
    assert outcome.code == 0, outcome.text
    assert "ERROR the save of step 0 was left without wait() or close()" in outcome.err
    assert "has failed; nothing was published: writing" in outcome.err
    assert generations(root) == ["checkpoint-00000001"]
    assert not list(root.glob(".partial-*"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_hangs_does_not_keep_the_job_from_its_end(
    jobs: Jobs, root: Path, ranks: int
) -> None:
    limit = "deadline_seconds=4"
    outcome = jobs.run(ranks, LEAVING, root, "pending_exit_stuck", "all", BEHIND, limit)
    assert outcome.code == 1, outcome.text
    assert "rank 0 of" in outcome.err
    assert "saving: no progress for" in outcome.err
    assert "CRITICAL the program has ended, but a save has not" in outcome.err
    assert generations(root) == ["checkpoint-00000001"]


@pytest.mark.parametrize(("how", "code"), [("pending_exit", 0), ("pending_raise", 1)])
def test_a_save_of_several_writers_is_given_up(
    jobs: Jobs, root: Path, how: str, code: int
) -> None:
    outcome = jobs.run(3, LEAVING, root, how, 0, BEHIND, "writers='all'")
    assert outcome.code == code, outcome.text
    assert "the save of step 0 was left without wait() or close() and is" in outcome.err
    assert generations(root) == ["checkpoint-00000001"]
    if code:
        again = jobs.run(1, LEAVING, root, "restore", "all")
        assert "generation 1 of 1 1" in again.out, again.text


@pytest.mark.parametrize("failing", ["0", "1", "all"])
def test_an_error_with_a_save_pending(jobs: Jobs, root: Path, failing: str) -> None:
    outcome = jobs.run(3, LEAVING, root, "pending_raise", failing, BEHIND)
    assert outcome.code == 1, outcome.text
    assert ("aborted" in outcome.err) == (failing != "all"), outcome.text
    assert f"ValueError: bad luck of rank {failing.replace('all', '1')}" in outcome.err
    assert saved_value(root, 1) == 1
    if failing != "1":  # root gives its save the time it needs
        assert "generation 2 is durable" in outcome.err
        assert saved_value(root, 2) == 2


@pytest.mark.parametrize("how", ["pending_dropped", "pending_close_at_exit"])
def test_a_save_whose_manager_is_not_closed_in_time(
    jobs: Jobs, root: Path, how: str
) -> None:
    outcome = jobs.run(2, LEAVING, root, how, "all", BEHIND)
    assert outcome.code == 0, outcome.text
    assert "Traceback" not in outcome.err
    assert saved_value(root, 2) == 2
