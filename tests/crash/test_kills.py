# SPDX-License-Identifier: Apache-2.0
"""Kill -9 of ranks and of mpirun: the same command goes on from the last acked save."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest

from tests.crash.programs.saver import last_line
from tests.crash.world import COUNTS, SEED, STRESS
from tests.launch import descendants, end_tree, finish_job, ranks_of, run_job, start_job

PROGRAM = str(Path(__file__).parent / "programs" / "saver.py")

KILLS = 26  # of all moments, in a default run

pytestmark = pytest.mark.timeout(1800 if STRESS else 300)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory for a program; what killed ranks and launchers leave is removed after.

    A killed mpirun leaves its session under its process id. The next with that id would
    find it and give up, so sessions are kept apart from those of other jobs.
    """
    with tempfile.TemporaryDirectory(prefix="ck", ignore_cleanup_errors=True) as sessions:
        monkeypatch.setenv("TMPDIR", sessions)  # a short path: sockets are made there
        yield tmp_path
    shared = tmp_path / "shared"
    for path in set(shared.read_text().split()) if shared.exists() else ():
        Path(path).unlink(missing_ok=True)


def fail_on_problem(directory):
    problem = directory / "problem"
    assert not problem.exists(), problem.read_text()


def test_kill_at_every_file_operation(directory):
    """Every job is the restart of the one killed before, with another number of ranks."""
    rng = random.Random(SEED)
    outcome = run_job(2, [PROGRAM, str(directory), "3"])
    assert outcome.code == 0, outcome.text
    outcome = run_job(2, [PROGRAM, str(directory), "2"])
    assert outcome.code == 0, outcome.text
    changes = last_line(directory / "changes")
    assert changes > 40  # restore, a save that prunes, another one
    moments = [
        (number, moment, victim)
        for number in range(1, changes + 1)
        for moment in ("before", "after")
        for victim in (0, 1)
    ]
    for count, kill in enumerate(moments if STRESS else rng.sample(moments, KILLS)):
        acked = last_line(directory / "acked")
        env = {"MPI_CKPT_TEST_KILL": " ".join(map(str, kill))}
        outcome = run_job(3 if count % 2 else 2, [PROGRAM, str(directory), "2"], env=env)
        fail_on_problem(directory)
        assert outcome.code != 124, outcome.text
        # Rank 1 may die when root is done with its last change: too late to be noticed.
        assert outcome.code != 0 or kill[2] == 1 or kill[0] > changes - 15, kill
        assert last_line(directory / "acked") >= acked
        COUNTS["kills at a file operation"] += 1
    outcome = run_job(4, [PROGRAM, str(directory), "1"])
    assert outcome.code == 0, outcome.text
    assert last_line(directory / "acked") >= 6


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def wait_for_saves(directory, least):
    """Wait until that step was acknowledged."""

    def there():
        return last_line(directory / "acked") >= least

    return wait_for(there, 30)


def alive(pids):
    """Return which of some processes have not ended."""
    living = []
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                living.append(pid)
    return living


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def everybody_of(job):
    """Return all processes of a job that is stopped, so that none can be added."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.pid, signal.SIGSTOP)
    return descendants(job.pid), ranks_of(job)


def end_job(job, everybody):
    """End what is left of a job: ranks of a dead mpirun are nobody's descendants."""
    end_tree(job.pid)
    kill(alive(everybody))
    return finish_job(job)


def kill_some(job, rng, everybody, running):
    """Kill all ranks, one of them, or mpirun; say whom."""
    victims = [("mpirun", [job.pid])]
    if running:
        victims += [("all ranks", running), ("a rank", [rng.choice(running)])]
    whom, pids = rng.choice(victims)
    kill(pids)
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.pid, signal.SIGCONT)
    return whom


def test_twenty_kills_never_lose_an_acknowledged_save(directory):
    rng = random.Random(SEED)
    for count in range(200 if STRESS else 20):
        acked = last_line(directory / "acked")
        ranks = rng.randint(1, 4)
        job = start_job(ranks, [PROGRAM, str(directory), "0"])
        everybody, whom = [], "nobody"
        try:
            # After this many saves at least; the first kill may come before any.
            saved = wait_for_saves(directory, acked + (rng.randint(1, 3) if count else 0))
            fail_on_problem(directory)
            if saved:
                time.sleep(rng.random() * 0.05)
                everybody, running = everybody_of(job)
                whom = kill_some(job, rng, everybody, running)
                # A job of one rank outlives Open MPI's mpirun: see the test below.
                patience = 1 if ranks == 1 and whom == "mpirun" else 20
                ended = wait_for(lambda pids=everybody: not alive(pids), patience)
                assert ended or patience == 1, f"{alive(everybody)} outlive {whom}, {count}"
        finally:
            outcome = end_job(job, everybody)
        assert saved, f"no save within 30 s before kill {count}: {outcome.text}"
        if whom == "mpirun":
            forget_lonely_ranks(directory)
        fail_on_problem(directory)
        COUNTS["kills at any time"] += 1
    outcome = run_job(2, [PROGRAM, str(directory), "1"])
    assert outcome.code == 0, outcome.text
    restored = [line.split() for line in (directory / "restored").read_text().splitlines()]
    assert len({size for _, size in restored}) > 1
    assert int(restored[-1][0]) >= 19


def forget_lonely_ranks(directory):
    """Ranks that start while mpirun dies find themselves alone, and refuse to save."""
    problem = directory / "problem"
    if problem.exists() and "LaunchError" in problem.read_text():
        problem.unlink()


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_of_mpirun(ranks, directory):
    """Ranks that outlive mpirun own the directory still: a second job is told so."""
    job = start_job(ranks, [PROGRAM, str(directory), "0"])
    everybody = []
    try:
        assert wait_for_saves(directory, 3)
        everybody, _ = everybody_of(job)
        kill([job.pid])
        if not wait_for(lambda: not alive(everybody), 3):
            refused = run_job(2, [PROGRAM, str(directory), "1"])
            assert refused.code not in (0, 124), refused.text
            told = (directory / "problem").read_text()
            assert "LockedError" in told
            assert f"process {alive(everybody)[-1]} on" in told
            (directory / "problem").unlink()
    finally:
        end_job(job, everybody)
    outcome = run_job(3, [PROGRAM, str(directory), "1"])
    fail_on_problem(directory)
    assert outcome.code == 0, outcome.text
