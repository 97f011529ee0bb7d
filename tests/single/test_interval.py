# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from datetime import timedelta

from mpi_ckpt.engine import interval
from mpi_ckpt.engine.interval import Interval


def test_every_so_many_steps_on_every_rank():
    every = Interval(3)
    for is_root in (True, False):
        due = [step for step in range(1, 10) if every.is_due(step, is_root=is_root)]
        assert due == [3, 6, 9]


def test_none_is_never_due():
    assert not any(Interval(None).is_due(step, is_root=True) for step in range(100))


def test_time_is_counted_from_the_last_save_by_roots_clock(monkeypatch):
    now = 100.0
    monkeypatch.setattr(interval.time, "monotonic", lambda: now)
    every = Interval(timedelta(seconds=10))
    now = 109.9
    assert not every.is_due(1, is_root=True)
    now = 110.0
    assert every.is_due(2, is_root=True)
    assert not every.is_due(2, is_root=False)
    every.restart()
    assert not every.is_due(3, is_root=True)
    now = 120.0
    assert every.is_due(4, is_root=True)
