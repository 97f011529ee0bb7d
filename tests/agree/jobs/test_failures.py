# SPDX-License-Identifier: Apache-2.0
"""Jobs that must not go on: started wrongly, on a directory in use, failing on one rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.jobs import PROGRAMS, Jobs, signal_to
from tests.launch import environment
from tests.waiting import limit

if TYPE_CHECKING:
    from pathlib import Path

OTHER_MPIRUN = os.environ.get("MPI_CKPT_TEST_OTHER_MPIRUN")


def test_rank_of_four_that_finds_itself_alone_is_refused(tmp_path: Path) -> None:
    # What the mpirun of an MPI other than the one that is loaded leaves behind.
    variables = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
    done = subprocess.run(
        [sys.executable, PROGRAMS / "steady.py", tmp_path / "root"],
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode not in (0, None), done.stderr
    assert "LaunchError: Open MPI started this process as rank 2 of 4" in done.stderr
    assert "Start the job with the mpirun of the MPI that mpi4py loads" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    OTHER_MPIRUN is None,
    reason="MPI_CKPT_TEST_OTHER_MPIRUN does not name the mpirun of the other MPI",
)
def test_mpirun_of_the_other_mpi_ends_with_an_error(tmp_path: Path) -> None:
    command = (sys.executable, PROGRAMS / "steady.py", tmp_path / "root")
    done = subprocess.run(
        [OTHER_MPIRUN, "-n", "2", *command],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode != 0, done.stderr
    # MPICH's library gives up by itself under Open MPI's mpirun, before we are asked.
    refused = "LaunchError: MPICH started this process as rank" in done.stderr
    assert refused or "Abort(" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_second_job_on_a_directory_is_refused_the_first_goes_on(
    jobs: Jobs, tmp_path: Path
) -> None:
    root, notes = tmp_path / "root", tmp_path / "notes"
    notes.mkdir()

    def newest() -> str:
        return max((path.name for path in root.glob("checkpoint-*")), default="")

    # The directory is owned from the first save on.
    first = jobs.start(2, PROGRAMS / "steady.py", root)
    jobs.wait_until(first, lambda: newest() != "")
    second = jobs.run(2, PROGRAMS / "note_exit.py", notes, PROGRAMS / "steady.py", root)
    assert second.code not in (0, 124), second.text
    first_note, second_note = ((notes / f"exit-{rank}").read_text() for rank in (0, 1))
    assert first_note == second_note, "the ranks were told different things"
    assert first_note.startswith("LockedError")
    assert f"{root} belongs to another running job (job " in first_note

    seen = newest()
    jobs.wait_until(first, lambda: newest() > seen)
    signal_to(first, signal.SIGTERM, 1)
    outcome = jobs.finish(first)
    assert outcome.code == 143, outcome.text


def test_failure_on_one_rank_ends_all_with_the_same_error(
    jobs: Jobs, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    command = (PROGRAMS / "note_exit.py", tmp_path, PROGRAMS / "one_rank_fails.py", root)
    outcome = jobs.run(3, *command)
    assert outcome.code == 1, outcome.text
    assert "not reached" not in outcome.out
    notes = {rank: (tmp_path / f"exit-{rank}").read_text() for rank in range(3)}
    assert notes[0] == notes[1] == notes[2]
    assert notes[0].startswith("StageError: ")
    assert "rank 1 of 3" in notes[0]
    assert "no luck today" in notes[0]
    generations = [path.name for path in root.iterdir() if not path.name.startswith(".")]
    assert generations == ["checkpoint-00000001"], "the first save, and nothing else"
