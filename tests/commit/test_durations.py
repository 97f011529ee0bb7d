# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.engine.steps.interval import Durations


def test_nothing_is_known_at_first():
    durations = Durations()
    assert (durations.stall_seconds, durations.durable_seconds) == (None, None)
    assert (durations.step_seconds, durations.last_step_seconds) == (0, 0)
    durations.note_end_of_save(3.0)  # of a save that failed
    assert durations.stall_seconds is None


def test_a_stall_is_the_usual_one_and_durable_the_longest_of_the_last_saves():
    durations = Durations()
    for seconds in (50, 1, 2, 3, 100, 2):
        durations.note_save(seconds)
        durations.note_durable(10 * seconds)
    assert (durations.stall_seconds, durations.durable_seconds) == (2, 1000)
    for _ in range(5):
        durations.note_save(1)
        durations.note_durable(5)
    assert (durations.stall_seconds, durations.durable_seconds) == (1, 5)


def test_the_end_of_a_save_is_part_of_its_stall():
    durations = Durations()
    durations.note_save(1.0)
    durations.note_end_of_save(0.5)
    assert durations.stall_seconds == 1.5


def test_steps_are_measured_without_the_saves_between():
    durations = Durations()
    durations.note_step(100.0)
    durations.note_step(102.0)
    assert (durations.step_seconds, durations.last_step_seconds) == (2, 2)
    durations.restart_step(190.0)  # a save has ended
    durations.note_step(194.0)
    assert (durations.step_seconds, durations.last_step_seconds) == (3, 4)


def test_the_mean_follows_steps_that_become_longer():
    durations, now = Durations(), 0.0
    for seconds in [1.0] * 50 + [2.0] * 60:
        now += seconds
        durations.note_step(now)
    assert durations.step_seconds == pytest.approx(2.0, rel=0.01)
