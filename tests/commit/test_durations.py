# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.engine.steps.interval import Costs


def test_nothing_is_known_at_first():
    costs = Costs()
    assert (costs.stall_seconds, costs.durable_seconds) == (None, None)
    assert (costs.step_seconds, costs.last_step_seconds) == (0, 0)
    costs.note_end_of_save(3.0)  # of a save that failed
    assert costs.stall_seconds is None


def test_a_stall_is_the_usual_one_and_durable_the_longest_of_the_last_saves():
    costs = Costs()
    for seconds in (50, 1, 2, 3, 100, 2):
        costs.note_save(seconds)
        costs.note_durable(10 * seconds)
    assert (costs.stall_seconds, costs.durable_seconds) == (2, 1000)
    for _ in range(5):
        costs.note_save(1)
        costs.note_durable(5)
    assert (costs.stall_seconds, costs.durable_seconds) == (1, 5)


def test_the_end_of_a_save_is_part_of_its_stall():
    costs = Costs()
    costs.note_save(1.0)
    costs.note_end_of_save(0.5)
    assert costs.stall_seconds == 1.5


def test_steps_are_measured_without_the_saves_between():
    costs = Costs()
    costs.note_step(100.0)
    costs.note_step(102.0)
    assert (costs.step_seconds, costs.last_step_seconds) == (2, 2)
    costs.restart_step(190.0)  # a save has ended
    costs.note_step(194.0)
    assert (costs.step_seconds, costs.last_step_seconds) == (3, 4)


def test_the_mean_follows_steps_that_become_longer():
    costs, now = Costs(), 0.0
    for seconds in [1.0] * 50 + [2.0] * 60:
        now += seconds
        costs.note_step(now)
    assert costs.step_seconds == pytest.approx(2.0, rel=0.01)
