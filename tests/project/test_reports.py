# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mpi_ckpt import reports
from mpi_ckpt.reports import GenerationInfo, PhaseClock


def test_clock_adds_up_phases_and_the_total(monkeypatch):
    now = 10.0
    monkeypatch.setattr(reports.time, "perf_counter", lambda: now)
    clock = PhaseClock()
    for spent in (1.0, 2.0):
        with clock.phase("write"):
            now += spent
    now += 0.5
    assert clock.seconds() == {"write": 3.0, "total": 3.5}


def test_phase_that_fails_is_counted():
    clock = PhaseClock()
    with pytest.raises(KeyError), clock.phase("write"):
        raise KeyError
    assert set(clock.seconds()) == {"write", "total"}


def test_generation_goes_through_json():
    info = GenerationInfo(
        generation=1,
        path=Path("/a/b"),
        step=2,
        time=3.5,
        size=4,
        nbytes=5,
        metrics={"x": math.inf},
    )
    told = json.loads(json.dumps(info.to_json()))
    assert GenerationInfo(**{**told, "path": Path(told["path"])}) == info
