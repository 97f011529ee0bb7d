# SPDX-License-Identifier: Apache-2.0
"""Every system call of a save and a restore fails, on every rank, in a job as it is run.

A default run goes through some faults, drawn by the seed. With MPI_CKPT_TEST_STRESS each
call of each kind fails with each error on each rank, until none fires any more.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
from pathlib import Path

import pytest

from tests.crash import faults
from tests.crash.faults import Fault, assert_soon
from tests.crash.tracing import ERRNOS, NOTHING, SYSTEM_CALLS, Traced, traced
from tests.crash.world import Training
from tests.draws import COUNTS, SEED, STRESS, TIMES
from tests.launch import run_job

PROGRAM = str(Path(__file__).parent / "programs" / "traced.py")
WORKLOADS = [*faults.workloads(), *faults.joint_workloads()]
JOINT = [workload.name for workload in WORKLOADS if workload.joint]
SOLO = [workload.name for workload in WORKLOADS if not workload.joint]

# What ranks do that write or read a share; the rest is root's.
OF_ANY_RANK = {"openat", "pwrite64", NOTHING, "preadv", "fsync", "getdents64", "statfs"}

# Failed by tests.crash.faults, in place of ``os``; or never told, as they only ask or hint.
# The history of a directory alone is written by `write`: tests/commit/test_journal.py.
ELSEWHERE = {
    "write",
    *("access", "close", "fstat", "lstat", "stat", "newfstatat", "statx"),
    *("fcntl", "fadvise64", "ioctl", "lseek", "mmap", "readlink", "getcwd"),
}


pytestmark = [
    pytest.mark.mpi,
    pytest.mark.timeout(300 * TIMES),
    pytest.mark.usefixtures("strace"),
]


def test_an_fsync_after_a_failed_one_is_seen(tmp_path):
    traced = Traced(Fault("fsync", 1, errno.EIO), tmp_path)
    path = tmp_path / "one.bin"
    with traced.in_place(), path.open("wb") as file:
        with pytest.raises(OSError, match="Input/output error"):
            os.fsync(file.fileno())
        os.fsync(file.fileno())
    assert (traced.fired, traced.missed, traced.retried) == (1, 0, [str(path)])


def kinds():
    """Give each call with each error that it can fail with."""
    for call, code in itertools.product(SYSTEM_CALLS, ERRNOS):
        if call != NOTHING or code == errno.EIO:
            yield call, code


def go_through(ranks, asked, tmp_path, *, timeout=250):
    """Run one job through faults; return the calls that did fail, one for each fault."""
    (tmp_path / "asked").write_text(json.dumps(asked))
    told = tmp_path / "told"
    command = [PROGRAM, str(tmp_path / "asked"), str(told)]
    outcome = run_job(ranks, command, timeout=timeout)
    assert outcome.code == 0, outcome.text
    fired, seconds = [], []
    for line in told.read_text().splitlines():
        report = json.loads(line)
        assert not report["wrong"], report
        assert all(error == report["errors"][0] for error in report["errors"]), report
        seconds.append(max(report["seconds"]))
        if report["fired"]:
            fired.append(report["call"])
    assert_soon(seconds)
    COUNTS["faults of system calls"] += len(fired)
    return fired


def drawn(names, ranks, number):
    """Draw faults; no call can be interrupted for ever, as Python calls again."""
    rng = random.Random(f"{SEED} {ranks}")
    chosen = []
    for _ in range(number):
        victim = rng.randrange(ranks)
        call, code = rng.choice([k for k in kinds() if victim == 0 or k[0] in OF_ANY_RANK])
        forever = code != errno.EINTR and rng.random() < 0.3
        name = rng.choice(names if victim == 0 else JOINT)
        chosen.append([name, victim, call, code, rng.choice((1, 1, 1, 2, 3)), forever])
    return chosen


@pytest.mark.parametrize(("ranks", "number", "least"), [(2, 70, 12), (4, 25, 1)])
def test_some_system_calls_fail(ranks, number, least, tmp_path):
    fired = go_through(
        ranks,
        drawn([*SOLO, *JOINT], ranks, number * TIMES),
        tmp_path,
        timeout=250 * TIMES,
    )
    assert len(fired) >= least
    assert len(set(fired)) > 1


@pytest.mark.skipif(not STRESS, reason="takes minutes: MPI_CKPT_TEST_STRESS=1")
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", [*SOLO, *JOINT])
def test_every_system_call_fails(name, tmp_path):
    victims = (0, 1) if name in JOINT else (0,)
    asked = [
        [name, victim, call, code, 0, False] for victim in victims for call, code in kinds()
    ]
    fired = go_through(2, asked, tmp_path, timeout=1200)
    assert len(fired) > 100
    assert {"openat", "getdents64"} <= set(fired)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_no_call_is_forgotten(workload, tmp_path):
    """Whatever a save or restore asks of its files is failed here or in test_faults."""
    sandbox, logs = tmp_path / "sandbox", tmp_path / "logs"
    sandbox.mkdir()
    logs.mkdir()
    faults.write_image(workload.base, sandbox)
    options = {"keep": workload.keep, **workload.options}
    with Training(sandbox / workload.root, **options) as training:
        workload.prepare(training)
        with traced(logs, "%file,%desc"):
            workload.act(training)
    made = {
        line.partition("(")[0]
        for log in logs.iterdir()
        for line in log.read_text(errors="replace").splitlines()
        if str(sandbox) in line
    }
    failed = {
        name.lstrip("?") for calls in SYSTEM_CALLS.values() for name in calls.split(",")
    }
    assert made - failed - ELSEWHERE == set()
    assert "openat" in made
