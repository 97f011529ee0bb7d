# SPDX-License-Identifier: Apache-2.0
"""Saves of some states, retention, and steps that save."""

import math
import time
from datetime import timedelta

import numpy as np
import pytest

from mpi_ckpt import (
    ArrayState,
    KeepBest,
    KeepEvery,
    KeepLast,
    ObjectState,
    State,
)
from mpi_ckpt.retention import RetentionPolicy
from tests.directories import names_in
from tests.ranks import assert_same, manager, plain


class Stream(State):
    text = ""

    def save(self, fileobj):
        fileobj.write(self.text.encode())

    def load(self, fileobj):
        self.text = fileobj.read().decode()


@pytest.fixture
def counter():
    return ObjectState("counter", 0)


def numbers(checkpoints):
    return [info.generation for info in checkpoints.generations()]


def test_generations_say_what_they_are(comm, shared_path, counter):
    before = time.time()
    with manager(
        shared_path, counter, ArrayState("a", {"x": np.arange(1000.0)})
    ) as checkpoints:
        assert checkpoints.generations() == []
        reports = [
            checkpoints.save(step=5, metrics={"loss": 0.5, "other": math.inf}),
            checkpoints.save(step=7, metrics={"loss": math.nan}),
        ]
        found = checkpoints.generations()
    assert_same(comm, [(i.generation, i.path, i.step, i.time, i.nbytes) for i in found])
    assert [info.generation for info in found] == [1, 2]
    assert [info.path for info in found] == [report.path for report in reports]
    assert [info.step for info in found] == [5, 7]
    assert [info.size for info in found] == [comm.size] * 2
    assert all(before <= info.time <= time.time() + 1 for info in found)
    assert found[0].metrics == {"loss": 0.5, "other": math.inf}
    assert math.isnan(found[1].metrics["loss"])
    sizes = comm.bcast(
        [sum(f.stat().st_size for f in info.path.iterdir()) for info in found]
        if comm.rank == 0
        else None
    )
    assert [info.nbytes for info in found] == sizes
    # A manager that only reads them off the disk finds the same.
    with manager(shared_path, counter) as checkpoints:
        again = checkpoints.generations()
        assert [(i.generation, i.step, i.nbytes) for i in again] == [
            (i.generation, i.step, i.nbytes) for i in found
        ]


def test_the_report_of_a_save(comm, shared_path, counter):
    stream = Stream("stream")
    stream.text = "x" * 123
    with manager(shared_path, counter, stream, retention=KeepLast(1)) as checkpoints:
        first = checkpoints.save(step=3)
        counter.value = 1
        second = checkpoints.save()
    for report in (first, second):
        assert_same(comm, plain(report))
        assert report.size == comm.size
        assert {"sync", "write", "publish", "total"} <= set(report.seconds)
        assert report.bytes_written >= 123
    assert (first.generation, first.step, first.pruned) == (1, 3, ())
    assert (second.generation, second.step, second.pruned) == (2, 0, (1,))
    assert first.path == shared_path / "checkpoint-00000001"


def test_a_save_of_some_takes_the_others_along(comm, shared_path):
    arrays, stream = {"x": np.zeros(2000)}, Stream("stream")
    value, alone = ObjectState("value", "v1"), ObjectState("alone", np.zeros(50))
    states = [ArrayState("arrays", arrays), stream, value, alone]
    stream.text = "s1"
    with manager(shared_path, *states) as checkpoints:
        checkpoints.save()
        arrays["x"][:], stream.text, value.value = 2, "s2", "v2"
        checkpoints.save(only=["stream"])
        arrays["x"][:], stream.text, value.value = 3, "s3", "v3"
        checkpoints.save(only=["arrays", "alone"])
        assert numbers(checkpoints) == [1, 2, 3]
        arrays["x"][:], stream.text, value.value = -1, "", ""
        checkpoints.restore()
        assert (arrays["x"] == 3).all()
        assert (stream.text, value.value) == ("s2", "v1")
    # Each is whole by itself: the others can go.
    if comm.rank == 0:
        for number in (1, 2):
            for file in (shared_path / f"checkpoint-{number:08d}").iterdir():
                file.unlink()
            (shared_path / f"checkpoint-{number:08d}").rmdir()
    comm.barrier()
    arrays["x"][:], stream.text, value.value = -1, "", ""
    with manager(shared_path, *states) as checkpoints:
        assert checkpoints.restore().generation == 3
    assert (arrays["x"] == 3).all()
    assert (stream.text, value.value) == ("s2", "v1")


def test_a_first_save_of_some(comm, shared_path, counter):
    other = ObjectState("other", "kept")
    with manager(shared_path, counter, other, strict=False) as checkpoints:
        assert checkpoints.save(only=["counter"]).generation == 1
        other.value = "live"
        assert checkpoints.restore().missing == ("other",)
    assert other.value == "live"


def test_restore_of_some(comm, shared_path, counter):
    other = ObjectState("other", "saved")
    with manager(shared_path, counter, other) as checkpoints:
        checkpoints.save(step=4)
        counter.value, other.value = comm.rank + 1, "live"
        report = checkpoints.restore(only=["counter"])
        assert (report.step, checkpoints.steps) == (4, 4)
        assert (report.missing, report.unexpected) == ((), ())
        assert (counter.value, other.value) == (0, "live")


def test_skipped_states_are_restored_but_not_saved(comm, shared_path, counter):
    other = ObjectState("other", "saved")
    with manager(shared_path, counter, other, strict=False) as checkpoints:
        checkpoints.save()
        other.skip = True
        other.value, counter.value = "live", 5
        checkpoints.save()
        counter.value = -1
        report = checkpoints.restore()
        assert (report.generation, report.missing) == (2, ("other",))
        assert (counter.value, other.value) == (5, "live")
        other.skip = False
        checkpoints.save(only=["other"])


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (KeepLast(1), [8]),
        (KeepLast(3), [6, 7, 8]),
        (KeepEvery(30), [1, 3, 6, 8]),
        (KeepBest("loss", mode="min"), [4, 8]),
        (KeepBest("loss", 2, mode="max"), [1, 2, 8]),
        (KeepLast(2) | KeepEvery(40) | KeepBest("loss", mode="min"), [1, 4, 7, 8]),
    ],
    ids=lambda value: None if isinstance(value, list) else type(value).__name__,
)
def test_retention(comm, shared_path, counter, policy, kept):
    losses = [0.9, 0.8, 0.5, 0.1, 0.2, math.nan, None, 0.7]
    pruned = []
    with manager(shared_path, counter, retention=policy) as checkpoints:
        for number, loss in enumerate(losses, start=1):
            counter.value = number
            metrics = {} if loss is None else {"loss": loss}
            pruned += checkpoints.save(step=10 * number, metrics=metrics).pruned
        assert numbers(checkpoints) == kept
        assert sorted(pruned + kept) == list(range(1, 9))
        counter.value = 0
        checkpoints.restore()
    assert counter.value == 8
    left = comm.bcast(names_in(shared_path) if comm.rank == 0 else None)
    assert left == [".lock", *(f"checkpoint-{number:08d}" for number in kept)]


def test_a_policy_that_fails_does_not_fail_the_save(comm, shared_path, counter):
    class Broken(RetentionPolicy):
        def keep(self, generations):
            raise ZeroDivisionError

        def __repr__(self):
            return "Broken()"

    with manager(shared_path, counter, retention=Broken()) as checkpoints:
        assert checkpoints.save().pruned == ()
        checkpoints.save()
        assert numbers(checkpoints) == [1, 2]


def test_steps_that_save(comm, shared_path, counter):
    with manager(shared_path, counter, interval=3, retention=KeepLast(9)) as checkpoints:
        for number in range(1, 11):
            counter.value = number
            assert checkpoints.step(metrics={"n": number}) is False
        assert checkpoints.steps == 10
        assert [info.step for info in checkpoints.generations()] == [3, 6, 9]
        assert checkpoints.generations()[-1].metrics == {"n": 9}
    with manager(shared_path, counter, interval=3) as checkpoints:
        checkpoints.restore()
        assert (checkpoints.steps, counter.value) == (9, 9)
        for _ in range(3):
            checkpoints.step()
        assert checkpoints.generations()[-1].step == 12


def test_no_interval_saves_nothing(comm, shared_path, counter):
    with manager(shared_path, counter) as checkpoints:
        for _ in range(5):
            assert checkpoints.step() is False
        assert checkpoints.steps == 5
        assert numbers(checkpoints) == []


def test_steps_that_save_by_roots_clock(comm, shared_path, counter):
    start = time.monotonic()
    with manager(shared_path, counter, interval=timedelta(seconds=0.1)) as checkpoints:
        saved = []
        # The others' clocks say nothing: they step and save as root does.
        while comm.bcast(time.monotonic() - start < 0.35 or not saved):
            before = checkpoints.generations()[-1:]
            checkpoints.step()
            if checkpoints.generations()[-1:] != before:
                saved.append(time.monotonic() - start)
        assert 1 <= len(saved) <= 4
        assert saved[0] >= 0.1
        assert_same(comm, (len(saved), checkpoints.steps, numbers(checkpoints)))


def test_a_save_of_any_kind_starts_the_time_anew(comm, shared_path, counter):
    with manager(shared_path, counter, interval=timedelta(seconds=60)) as checkpoints:

        def let_pass(seconds):
            checkpoints._steps._interval._saved_at -= seconds

        def take_steps():
            for _ in range(3):  # what is due is saved a step later
                checkpoints.step()
            return numbers(checkpoints)

        let_pass(100)
        checkpoints.save()
        assert take_steps() == [1]
        let_pass(100)
        checkpoints.restore()
        assert take_steps() == [1]
        if comm.rank > 0:
            let_pass(100)
        assert take_steps() == [1]
        if comm.rank == 0:
            let_pass(100)
        assert take_steps() == [1, 2]
