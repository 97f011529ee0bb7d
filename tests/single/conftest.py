# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests that need one process only."""

from __future__ import annotations

import os
import random
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    deadline=None,  # shared machines stall; a hang is pytest-timeout's to end
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def seeded():
    """Give every test the same random streams."""
    random.seed(1)
    np.random.seed(1)


@pytest.fixture(autouse=True)
def no_leaks():
    """Fail a test that leaves a descriptor or a thread behind."""
    threads, files = set(threading.enumerate()), _descriptors()
    yield
    assert not _descriptors() - files
    assert not set(threading.enumerate()) - threads


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:  # the one that listed them
            continue
    return found
