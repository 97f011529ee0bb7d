# SPDX-License-Identifier: Apache-2.0
"""A short run of what scripts/fuzz does for long: the same targets, a seed, no coverage."""

from __future__ import annotations

import pickle
import random
import time

import pytest

from tests.hostile.fuzzing.mutate import mutate
from tests.hostile.fuzzing.targets import TARGETS, clear, seeds
from tests.hostile.watch import watched

_POOL_BYTES = 5000
INPUTS = {"manifest": 2500, "header": 1500, "tiles": 2000, "directory": 1000}


@pytest.fixture(autouse=True)
def cleared():
    yield
    clear()


@pytest.mark.parametrize("target", TARGETS)
def test_good_inputs_are_good(target):
    assert all(TARGETS[target](data) for data in seeds(target))


@pytest.mark.parametrize("target", TARGETS)
def test_changed_inputs_are_refused_or_read_and_nothing_else(target):
    rng = random.Random(f"{target} 1")
    pool = seeds(target)
    good = 0
    for _ in range(INPUTS[target]):
        data = mutate(target, rng.choice(pool), rng)
        if TARGETS[target](data):
            good += 1
            pool += [data] if len(data) < _POOL_BYTES else []
    # If all were refused at the door, nothing behind it was tried.
    assert good > INPUTS[target] // 100


def test_what_the_watch_is_for_is_seen(tmp_path):
    outside = tmp_path / "outside"
    pickled = pickle.dumps(print)
    with pytest.raises(AssertionError, match="changed outside"), watched(tmp_path / "root"):
        outside.write_bytes(b"x")
    with pytest.raises(AssertionError, match="extra bytes"), watched(tmp_path):
        bytearray(200 << 20)
    # What earlier work has freed and the allocator has kept is no room to hide in.
    for _ in range(2):  # the first of them lets the second be in the allocator's own heap
        pieces = [bytearray(20 << 20) for _ in range(15)]
        del pieces[:-1]
    with pytest.raises(AssertionError, match="extra bytes"), watched(tmp_path):
        bytearray(200 << 20)
    with pytest.raises(AssertionError, match="seconds"), watched(tmp_path):  # noqa: PT012
        end = time.process_time() + 1.1
        while time.process_time() < end:
            pass
    with pytest.raises(AssertionError, match="find_class"), watched(tmp_path):
        pickle.loads(pickled)
