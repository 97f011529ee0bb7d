# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests that need one process only."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tests.draws import STRESS
from tests.leaks import nothing_left

settings.register_profile(
    "suite",
    deadline=None,  # shared machines stall; a hang is pytest-timeout's to end
    max_examples=1000 if STRESS else 50,
    derandomize=not STRESS,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def seeded():
    """Give every test the same random streams."""
    random.seed(1)
    np.random.seed(1)


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """Wait for no disk: what survives a power cut is the subject of tests/crash.

    Some tests here sync hundreds of times, and a busy disk takes a second for one.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def no_leaks():
    """Fail a test that leaves a descriptor or a thread behind."""
    with nothing_left():
        yield
