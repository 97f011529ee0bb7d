# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from datetime import timedelta

import pytest

from mpi_ckpt.engine.steps import interval
from mpi_ckpt.engine.steps.interval import Durations, Interval
from mpi_ckpt.pacing import AutoInterval, Failures


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(interval, "time", clock)
    return clock


def test_every_so_many_steps():
    every = Interval(3, Durations())
    assert [step for step in range(1, 10) if every.is_due_at(step)] == [3, 6, 9]
    assert not every.is_due_now()


def test_none_is_never_due():
    never = Interval(None, Durations())
    assert not any(never.is_due_at(step) for step in range(100))
    assert not never.is_due_now()


def test_time_is_counted_from_the_last_save(clock):
    every = Interval(timedelta(seconds=10), Durations())
    assert not every.is_due_at(1)
    clock.now = 109.9
    assert not every.is_due_now()
    clock.now = 110.0
    assert every.is_due_now()
    every.restart()
    assert not every.is_due_now()
    clock.now = 120.0
    assert every.is_due_now()


@pytest.fixture
def durations():
    """Steps of 0.75 s."""
    durations = Durations()
    for step in range(20):
        durations.note_step(0.75 * step)
    return durations


def test_the_first_save_comes_soon_and_tells_what_saves_cost(clock, durations):
    auto = Interval(AutoInterval(), durations)
    clock.now = 159.9
    assert not auto.is_due_now()
    clock.now = 160.0
    assert auto.is_due_now()
    auto.restart()
    durations.note_save(10.0)
    durations.note_durable(10.0)
    clock.now = 160 + 1307
    assert not auto.is_due_now()
    clock.now = 160 + 1309
    assert auto.is_due_now()


def test_the_plan_is_explained_once(clock, durations, caplog):
    caplog.set_level(logging.INFO)
    auto = Interval(AutoInterval(), durations)
    auto.failures = Failures(86400.0, "as given")
    auto.is_due_now()
    assert caplog.messages == []
    durations.note_save(1.2)
    auto.is_due_now()
    durations.note_save(5.0)
    durations.note_save(5.0)
    auto.is_due_now()
    (text,) = caplog.messages
    assert text == (
        "saving every 455 s (about 606 steps): a save stops the training for 1.2 s, "
        "the job fails every 24 h (as given), saves may take 2% of the time"
    )


def test_a_plan_stays_until_a_better_one_differs_by_much(clock, durations):
    auto = Interval(AutoInterval(), durations)

    def seconds(stall):
        for _ in range(5):
            durations.note_save(stall)
        auto.is_due_now()
        return auto._seconds

    first = seconds(10.0)
    assert seconds(12.0) == first  # would be 9% more
    assert seconds(9.0) == first
    assert seconds(20.0) > 1.3 * first


def test_what_a_save_costs_is_what_it_stops_the_training_for(clock, durations):
    auto = Interval(AutoInterval(mtbf=timedelta(hours=24)), durations)
    durations.note_save(0.1)
    durations.note_durable(60.0)  # behind the training
    auto.is_due_now()
    assert auto._seconds == pytest.approx(131.5, rel=1e-2)
    durations.note_durable(200.0)  # no save is due while the last one is on its way
    auto.is_due_now()
    assert auto._seconds == 200.0
