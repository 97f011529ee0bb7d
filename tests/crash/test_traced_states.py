# SPDX-License-Identifier: Apache-2.0
"""What strace saw of whole jobs is what the seam has recorded, and its crash states."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.crash.crashes import (
    Scenario,
    assert_explained,
    judge_crashes,
    quiet_scratch,
    saved_image,
)
from tests.crash.recorder import Op, from_json, merge, to_json
from tests.crash.replay import write_image
from tests.crash.strace_log import read_log
from tests.crash.world import Saved
from tests.draws import COUNTS, SEED, STRESS
from tests.launch import run_job

PROGRAM = str(Path(__file__).parent / "programs" / "traced_writers.py")

JOBS = [(2, "root", "blocking"), (2, "all", "asynchronous"), (4, "all", "blocking")]

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("strace"),
]


def in_one_order(ops):
    """Return operations numbered alike; what may come in any order is sorted.

    That are writes to one file, from several threads; marks, which fall between what is
    pruned behind the training, are left out.
    """
    numbers = {0: 0}
    result = [
        replace(op, file=numbers.setdefault(op.file, len(numbers)))
        for op in ops
        if op.kind != "mark"
    ]
    for end in range(1, len(result)):
        at = end
        while at and later(result[at - 1], result[at]):
            result[at - 1], result[at] = result[at], result[at - 1]
            at -= 1
    return result


def later(scenario, other):
    """Tell whether two neighbours are writes to one file, the first of the later bytes."""
    writes = scenario.kind == other.kind == "pwrite" and scenario.file == other.file
    return writes and scenario.offset > other.offset


@contextlib.contextmanager
def traced_job(ranks, writers, way, **env):
    """Run a job; give its sandbox, and of each rank what strace and the seam have seen."""
    with quiet_scratch() as sandbox, quiet_scratch() as records:
        write_image(saved_image([1])[0], sandbox)
        job = [PROGRAM, str(sandbox), str(records), writers, way]
        outcome = run_job(ranks, job, timeout=120, env=env)
        assert outcome.code == 0, outcome.text
        yield (
            sandbox,
            [
                read_log((records / f"log.{rank}").read_text(), str(sandbox))
                for rank in range(ranks)
            ],
            [from_json((records / f"seam.{rank}").read_text()) for rank in range(ranks)],
        )


@pytest.mark.parametrize(("ranks", "writers", "way"), JOBS)
def test_strace_sees_what_the_seam_records_and_no_state_is_bad(ranks, writers, way):
    base, saves = saved_image([1])
    saves += [Saved.of(2), Saved(3, 2, 3), Saved.of(4)]
    name = f"traced: {ranks} ranks, {writers}, {way}"
    with traced_job(ranks, writers, way) as (sandbox, traced, seams):
        for (_, ops), seam in zip(traced, seams, strict=True):
            assert in_one_order(ops) == in_one_order(seam)
            COUNTS["operations seen by strace as by the seam"] += len(ops)
        ops = merge([(times, to_json(ops)) for times, ops in traced])
        scenario = Scenario(name, base, ops, saves=saves, acked=0)
        assert_explained(scenario, sandbox)
    assert {"create", "pwrite", "link", "rename", "unlink"} <= {op.kind for op in ops}
    assert sum(op.kind == "mark" for op in ops) == 3 * ranks
    result = judge_crashes(scenario, SEED, samples=10, limit=None if STRESS else 100)
    assert not result.bad, str(result)
    assert result.states >= 80


def test_strace_sees_what_is_done_behind_the_seam():
    env = {"MPI_CKPT_TEST_BEHIND": "1"}
    with traced_job(1, "root", "blocking", **env) as (_, [(_, ops)], [seam]):
        seen, told = in_one_order(ops), in_one_order(seam)
    assert [op for op in seen if op not in told] == [Op("mkdir", "behind")]
    assert len(seen) == len(told) + 1
