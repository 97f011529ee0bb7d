# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from datetime import timedelta

import pytest

from mpi_ckpt.errors import OptionsError
from mpi_ckpt.pacing import ASSUMED, AutoInterval, best_interval, count_failures

DAY = 86400.0


def lost_share(interval, cost, mtbf):
    """Return Daly's expected share of time lost, if a restart costs nothing."""
    return mtbf / interval * math.expm1((interval + cost) / mtbf) - 1


@pytest.mark.parametrize(
    ("cost", "mtbf", "seconds"),
    [
        # By hand: sqrt(2 * 10 * 86400) = 1314.5; the corrections add 3.3 and take off 10.
        (10.0, DAY, 1307.9),
        (60.0, DAY, 3180.0),
        (300.0, 6 * 3600.0, 3402.3),
        (5.0, 3600.0, 186.4),
    ],
)
def test_interval_of_young_and_daly(cost, mtbf, seconds):
    found = best_interval(cost, 0, mtbf, overhead=0.99)
    assert found == pytest.approx(seconds, rel=1e-3)


@pytest.mark.parametrize("cost", [0.1, 1.0, 30.0, 600.0])
@pytest.mark.parametrize("mtbf", [3600.0, DAY, 30 * DAY])
def test_no_other_interval_loses_noticeably_less(cost, mtbf):
    best = best_interval(cost, 0, mtbf, overhead=0.99)
    least = min(lost_share(best * (0.2 + 0.01 * n), cost, mtbf) for n in range(300))
    assert lost_share(best, cost, mtbf) <= least * 1.01


def test_a_save_longer_than_the_time_between_failures():
    assert best_interval(100.0, 0, 40.0, overhead=0.99) == 40.0


def test_saves_take_no_more_than_their_share():
    # Failures every hour would ask for a save every 263 s: 3.7% of the time.
    assert best_interval(10.0, 0, 3600.0, overhead=0.99) == pytest.approx(261.8, rel=1e-3)
    seconds = best_interval(10.0, 0, 3600.0, overhead=0.02)
    assert 10.0 / (seconds + 10.0) == pytest.approx(0.02)


def test_no_save_is_due_before_the_last_one_is_durable():
    assert best_interval(0.001, 40.0, DAY, overhead=0.02) == 40.0


def test_what_the_generations_tell_of_failures():
    saves = [("a", 0.0), ("a", 100.0), ("b", 1000.0), ("c", 2500.0), ("d", 2900.0)]
    found = count_failures(saves, job="d", now=3000.0)
    assert found.mtbf_seconds == 1000.0
    assert found.source == "3 jobs have ended since the oldest generation"
    # The present job may not have saved yet: then all that have saved are over.
    assert count_failures(saves, job="e", now=3000.0).mtbf_seconds == 750.0


@pytest.mark.parametrize(
    "saves",
    [
        [],
        [("a", 0.0)] * 9,
        [("a", 0.0), ("b", 5.0)],
        [("a", 9e9), ("b", 9e9), ("c", 9e9)],  # a clock that was wrong
    ],
    ids=["nothing", "one job", "two jobs", "the future"],
)
def test_too_little_is_known_of_failures(saves):
    assert count_failures(saves, job="mine", now=1000.0) is ASSUMED


@pytest.mark.parametrize(
    "given", [{"overhead": 0}, {"overhead": 1.0}, {"mtbf": timedelta(0)}], ids=repr
)
def test_values_out_of_range_are_refused(given):
    (name,) = given
    with pytest.raises(OptionsError, match=name):
        AutoInterval(**given)
