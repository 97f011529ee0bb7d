# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading

import pytest

from mpi_ckpt.engine.background import Background


@pytest.fixture
def background():
    background = Background()
    yield background
    background.close()


def test_work_runs_in_order_on_one_other_thread(background):
    seen = []
    for number in range(5):
        background.submit(
            lambda number=number: seen.append((number, threading.current_thread()))
        )
    background.join()
    assert [number for number, _ in seen] == [0, 1, 2, 3, 4]
    assert len({thread for _, thread in seen}) == 1
    assert threading.current_thread() not in {thread for _, thread in seen}


def test_join_waits_and_leaves_failures_to_whoever_asks(background):
    gate = threading.Event()
    future = background.submit(lambda: gate.wait(10) and 1 / 0)
    assert not future.done()
    gate.set()
    background.join()
    assert future.done()
    with pytest.raises(ZeroDivisionError):
        future.result()
    assert background.submit(lambda: 5).result() == 5


def test_close_finishes_what_was_submitted_and_can_come_twice(background):
    done = []
    background.submit(lambda: done.append(1))
    background.close()
    background.close()
    background.join()
    assert done == [1]


def test_thread_is_started_only_when_needed(background):
    before = threading.active_count()
    background.join()
    background.close()
    assert threading.active_count() == before
