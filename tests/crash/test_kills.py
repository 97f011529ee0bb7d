# SPDX-License-Identifier: Apache-2.0
"""Kill -9 of ranks and of mpirun: the same command goes on from the last acked save."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest

from tests.crash.kill_cycles import Cycles
from tests.crash.killing import (
    alive,
    end_job,
    everybody_of,
    fail_on_problem,
    forget_survivors,
    kill,
    kill_some,
    own_sessions,
    remove_shared_memory,
)
from tests.crash.moments import MOMENTS
from tests.crash.programs.saver import last_line
from tests.draws import COUNTS, SEED, STRESS, TIMES
from tests.launch import run_job, start_job
from tests.waiting import wait_for

PROGRAM = str(Path(__file__).parent / "programs" / "saver.py")

# Of all moments, in a default run.
# A job is started for each, so a plain run draws fewer.
KILLS_AT_CHANGES = 12 if TIMES == 1 else 22 * TIMES
KILLS_AT_COLLECTIVES = 8 if TIMES == 1 else 14 * TIMES
KILLS_AT_ANY_TIME = 12 if TIMES == 1 else 20 * TIMES
KILLS_OF_A_TRAINING = 10 * TIMES
KILLS_WITH_TILES = 6 * TIMES

VICTIMS = ("0", "1", "2", "all", "mpirun")

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.timeout(3600 if STRESS else 900),
]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory for a program; what killed ranks and launchers leave is removed after."""
    with own_sessions() as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        yield tmp_path
    remove_shared_memory(tmp_path)


@pytest.mark.parametrize(
    ("kind", "what", "few"),
    [
        ("change", "whole", KILLS_AT_CHANGES),
        ("collective", "whole", KILLS_AT_COLLECTIVES),
        ("change", "cut", KILLS_WITH_TILES),
        ("collective", "cut", KILLS_WITH_TILES),
    ],
)
def test_kill_at_every(kind, what, few, directory):
    """Every job is the restart of the one killed before; ranks come and go."""
    rng = random.Random(SEED)
    for saves in ("3", "2"):
        outcome = run_job(2, [PROGRAM, str(directory), saves, what])
        assert outcome.code == 0, outcome.text
    number = last_line(directory / f"{kind}s")
    assert number > 30  # restore, a save that prunes, another one
    kills = list(itertools.product(range(1, number + 1), MOMENTS, VICTIMS))
    hits = 0
    for count, planned in enumerate(kills if STRESS else spread(kills, few, rng)):
        # Two, three and four by turns, or who is to be killed is not there.
        least = 3 if planned[-1] == "2" else 2
        hits += kill_at(directory, kind, what, planned, ranks=max(2 + count % 3, least))
        COUNTS[f"kills at a {kind}"] += 1
    # How a job saves depends on what was acked, and so does how much it does; and the last
    # thing that it does may be too late to be noticed.
    assert hits > few // 2
    outcome = run_job(4, [PROGRAM, str(directory), "1", what])
    assert outcome.code == 0, outcome.text
    assert last_line(directory / "acked") >= 6


def spread(items, few, rng):
    """Draw one of each of so many equal parts of a list; return them in any order."""
    edges = [len(items) * part // few for part in range(few + 1)]
    drawn = [items[rng.randrange(*bounds)] for bounds in itertools.pairwise(edges)]
    return rng.sample(drawn, few)


def kill_at(directory, kind, what, planned, ranks):
    """Run a job that is killed at a moment; tell whether it was."""
    acked = last_line(directory / "acked")
    env = {"MPI_CKPT_TEST_KILL": " ".join(map(str, (kind, *planned)))}
    outcome = run_job(ranks, [PROGRAM, str(directory), "2", what], env=env)
    # A killed mpirun is gone before its ranks are.
    running = [int(pid) for pid in (directory / "pids").read_text().split()]
    assert wait_for(lambda: not alive(running), 60), f"{kill}: {alive(running)} live on"
    forget_survivors(directory)
    fail_on_problem(directory)
    assert outcome.code != 124, outcome.text
    assert last_line(directory / "acked") >= acked
    return outcome.code != 0


def wait_for_saves(directory, least):
    """Wait until that step was acknowledged."""

    def there():
        return last_line(directory / "acked") >= least

    return wait_for(there, 120)


@pytest.mark.parametrize(
    ("what", "few"), [("whole", KILLS_AT_ANY_TIME), ("cut", KILLS_WITH_TILES)]
)
def test_kills_at_any_time_never_lose_an_acknowledged_save(what, few, directory):
    rng = random.Random(SEED)
    for count in range(200 if STRESS else few):
        acked = last_line(directory / "acked")
        ranks = rng.randint(1, 4)
        job = start_job(ranks, [PROGRAM, str(directory), "0", what])
        everybody, whom = [], "nobody"
        try:
            # After this many saves at least; the first kill may come before any.
            saved = wait_for_saves(directory, acked + (rng.randint(1, 3) if count else 0))
            fail_on_problem(directory)
            if saved:
                time.sleep(rng.random() * 0.05)
                everybody, running = everybody_of(job)
                whom = kill_some(job, rng, running)
                # A job of one rank outlives Open MPI's mpirun: see the test below.
                patience = 1 if ranks == 1 and whom == "mpirun" else 90
                ended = wait_for(lambda pids=everybody: not alive(pids), patience)
                assert ended or patience == 1, f"{alive(everybody)} outlive {whom}, {count}"
        finally:
            outcome = end_job(job, everybody)
        assert saved, f"no save in time before kill {count}: {outcome.text}"
        forget_survivors(directory)
        fail_on_problem(directory)
        COUNTS["kills at any time"] += 1
    outcome = run_job(2, [PROGRAM, str(directory), "1", what])
    assert outcome.code == 0, outcome.text
    restored = [line.split() for line in (directory / "restored").read_text().splitlines()]
    assert len({size for _, size in restored}) > 1
    assert int(restored[-1][0]) >= few - 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_of_mpirun(ranks, directory):
    """Ranks that outlive mpirun own the directory still: a second job is told so."""
    job = start_job(ranks, [PROGRAM, str(directory), "0"])
    everybody = []
    try:
        assert wait_for_saves(directory, 3)
        everybody, _ = everybody_of(job)
        kill([job.pid])
        # Of MPI's launchers only Open MPI's leaves ranks behind, those of a job of one.
        if not wait_for(lambda: not alive(everybody), 3 if ranks == 1 else 60):
            refused = run_job(2, [PROGRAM, str(directory), "1"])
            if left := alive(everybody):
                assert refused.code not in (0, 124), refused.text
                told = (directory / "problem").read_text()
                assert "LockedError" in told
                assert f"process {left[-1]} on" in told
            (directory / "problem").unlink(missing_ok=True)
    finally:
        end_job(job, everybody)
    outcome = run_job(3, [PROGRAM, str(directory), "1"])
    fail_on_problem(directory)
    assert outcome.code == 0, outcome.text


@pytest.mark.parametrize(
    ("cut", "few"),
    [(False, KILLS_OF_A_TRAINING), (True, KILLS_WITH_TILES)],
    ids=["whole", "cut"],
)
def test_training_killed_at_any_time_ends_with_the_same_weights(tmp_path, cut, few):
    kills = 500 if STRESS else few
    with own_sessions() as env:
        cycles = Cycles(tmp_path, env, ranks=2, epochs=20, seed=SEED, cut=cut)
        for _ in range(kills):
            cycles.kill_once()
        cycles.end()
    assert cycles.figures.trainings >= 1
    assert cycles.figures.cycles == kills
    COUNTS["kills of a training"] += kills
