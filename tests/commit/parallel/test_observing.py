# SPDX-License-Identifier: Apache-2.0
"""What is heard of the saves of several ranks: by root alone, in every form of a save."""

import json
import logging

import numpy as np
import pytest

from mpi_ckpt import ArrayState, CheckpointManager, ConcatState, Hooks, Options
from mpi_ckpt.engine.observer import VARIABLE
from tests.ranks import assert_same
from tests.trace_format import problems_of

FORMS = {
    "root": {},
    "every rank writes": {"writers": "all"},
    "in the background": {"asynchronous": True},
    "all, in the background": {"writers": "all", "asynchronous": True},
}


def manager(path, comm, *, hooks=None, **more):
    states = [
        ArrayState("a", {"x": np.full(5000, 1.0)}),
        ConcatState("rows", {"y": np.full((comm.rank + 1, 3), 2.0)}),
    ]
    options = Options(preemption_signals=(), hooks=hooks or Hooks(), **more)
    return CheckpointManager(path, states, comm=comm, options=options)


@pytest.mark.parametrize("form", FORMS)
def test_root_alone_hears_of_each_save_and_all_keep_the_last(comm, shared_path, form):
    heard = []
    hooks = Hooks(on_save=heard.append, on_restore=heard.append)
    with manager(shared_path, comm, hooks=hooks, interval=2, **FORMS[form]) as job:
        job.restore()
        for step in range(1, 6):
            job.step(metrics={"loss": float(step + comm.rank)})
        job.wait()
        assert job.last_save.generation == 2
        # Of root, which is what is saved; the ranks may have given others.
        assert job.last_save.metrics == {"loss": 4.0}
        assert_same(comm, (job.last_save.generation, job.last_save.kept))
        job.restore()
    steps = [report.step for report in heard]
    assert steps == ([2, 4, 4] if comm.rank == 0 else [])


def test_a_hook_that_fails_on_root_disturbs_no_rank(comm, shared_path, caplog):
    def unlucky(report):
        raise OSError("no luck")

    hooks = Hooks(on_save=unlucky) if comm.rank == 0 else Hooks()
    with manager(shared_path, comm, hooks=hooks) as job:
        assert [job.save().generation for _ in range(3)] == [1, 2, 3]
        job.restore()
    assert ("no luck" in caplog.text) == (comm.rank == 0)


def test_a_hook_that_meets_is_refused_and_the_job_goes_on(comm, shared_path, caplog):
    jobs = []
    hooks = Hooks(on_save=lambda _: jobs[0].restore())
    with manager(shared_path, comm, hooks=hooks) as job:
        jobs.append(job)
        assert job.save().generation == 1
        assert job.save().generation == 2
    said = "called in Hooks.on_save, which root alone runs" in caplog.text
    assert said == (comm.rank == 0)


def test_the_log_has_its_lines_on_root_only(comm, shared_path, caplog):
    caplog.set_level(logging.INFO, "mpi_ckpt")
    with manager(shared_path, comm) as job:
        job.restore()
        job.save(600)
        job.restore()
    texts = [r.getMessage() for r in caplog.records if r.name == "mpi_ckpt.engine.observer"]
    starts = [text.split(":")[0] for text in texts]
    by = f"by {comm.size} rank{'' if comm.size == 1 else 's'}"
    expected = [
        f"nothing in {shared_path}",
        f"saved generation 1, step 600, {by}",
        f"restored generation 1, step 600, saved {by}",
    ]
    assert starts == (expected if comm.rank == 0 else [])


@pytest.mark.parametrize("form", FORMS)
def test_a_timeline_has_the_phases_of_every_rank(comm, shared_path, form, monkeypatch):
    path = shared_path / "timeline.json"
    if comm.rank == 0:  # root's environment decides for all
        monkeypatch.setenv(VARIABLE, str(path))
    else:
        monkeypatch.delenv(VARIABLE, raising=False)
    for _ in range(2):
        with manager(shared_path / "c", comm, **FORMS[form]) as job:
            job.restore()
            job.save().wait()
    comm.barrier()
    for name in ("timeline.json", "timeline-2.json"):
        events = json.loads((shared_path / name).read_text())
        assert problems_of(events) == []
        spans = [event for event in events if event["ph"] == "X"]
        assert {event["pid"] for event in spans} == set(range(comm.size))
        roots = {event["name"] for event in spans if event["pid"] == 0}
        assert {"saving", "sync", "write", "publish"} <= roots
        kinds = {event["cat"] for event in spans}
        assert {"operation", "phase"} <= kinds
        assert comm.size == 1 or "wait" in kinds
        for rank in range(comm.size):
            mine = [e for e in spans if e["pid"] == rank]
            assert all(event["dur"] >= 0 for event in mine)
            (saving,) = [e for e in mine if e["name"] == "saving"]
            (sync,) = [e for e in mine if e["name"] == "sync"]
            assert saving["ts"] <= sync["ts"]
            assert sync["ts"] + sync["dur"] <= saving["ts"] + saving["dur"] + 100
        behind = [e for e in spans if e["tid"] == 1]
        assert bool(behind) == ("asynchronous" in FORMS[form])


def test_a_timeline_that_cannot_be_written_is_no_error(comm, shared_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(shared_path / "not" / "there.json"))
    with manager(shared_path / "c", comm) as job:
        assert job.save().generation == 1
        assert job.save().generation == 2


def test_without_a_timeline_nothing_is_recorded(comm, shared_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with manager(shared_path, comm) as job:
        job.save()
        assert job._session.comm.on_wait is None
        assert job._session.timeline._events == []
