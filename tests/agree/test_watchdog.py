# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import os
import re
import threading
import time

import pytest

from mpi_ckpt.engine.watchdog import Watchdog
from tests.waiting import wait_for

QUIET_SECONDS = 0.1


@pytest.fixture
def warnings():
    """What is warned of, as it comes."""
    told = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("mpi_ckpt.engine.watchdog")
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


@pytest.fixture
def in_thread():
    """Runs a function in a thread until the test is over."""
    over = threading.Event()
    started = []

    def start(work, name):
        thread = threading.Thread(target=work, args=(over,), name=name, daemon=True)
        started.append(thread)
        thread.start()

    yield start
    over.set()
    for thread in started:
        thread.join()


def watchdog(steps=lambda: 0, phase="write", *, quiet_seconds=QUIET_SECONDS):
    return Watchdog("rank 1 of 3 on h, saving", quiet_seconds, steps, lambda: phase)


def test_what_stands_still_is_told_once(warnings):
    with watchdog():
        assert wait_for(lambda: warnings)
        time.sleep(5 * QUIET_SECONDS)
    (text,) = warnings
    start = (
        r"rank 1 of 3 on h, saving: no progress for \S+ s, phase write, files: none open\n"
    )
    assert re.match(start, text)
    assert "  MainThread is at\n" in text
    assert re.search(
        rf"\n    {__file__}:\d+, in test_what_stands_still_is_told_once\n", text
    )


def test_open_files_of_a_generation_are_named(warnings, tmp_path):
    partial, other = tmp_path / ".partial-00000003-abc", tmp_path / "other"
    for folder in (partial, other):
        folder.mkdir()
    with (
        open(partial / "rank-00000.safetensors", "wb"),
        open(other / "rank-00000.safetensors", "wb"),
        watchdog(phase=""),
    ):
        assert wait_for(lambda: warnings)
    assert f"phase not begun, files: {partial / 'rank-00000.safetensors'}\n" in warnings[0]


def test_a_thread_that_works_for_the_operation_is_shown(warnings, in_thread):
    in_thread(threading.Event.wait, "mpi_ckpt-write_0")
    with watchdog():
        assert wait_for(lambda: warnings)
    assert re.search(r"\n  mpi_ckpt-write_0 is at\n    \S+, in wait\n", warnings[0])


def test_who_gets_on_is_left_alone(warnings):
    count = iter(range(10**9))
    with watchdog(lambda: next(count)):
        time.sleep(4 * QUIET_SECONDS)
    assert warnings == []


def test_bytes_are_progress_too(warnings):
    # Room for a machine that lets a thread wait, and three times that long in all. No
    # file on a disk, which may hold up its writer for as long.
    with watchdog(quiet_seconds=1), open(os.devnull, "wb", buffering=0) as file:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            file.write(b"x")
            time.sleep(0.01)
    assert warnings == []


def test_bytes_of_another_thread_are_not(warnings, in_thread):
    def write(over):
        with open(os.devnull, "wb", buffering=0) as file:
            while not over.wait(0.001):
                file.write(b"x")

    in_thread(write, "of the program")
    with watchdog():
        assert wait_for(lambda: warnings)


def test_its_thread_ends_with_the_operation():
    before = threading.enumerate()
    watch = watchdog(quiet_seconds=1e6)
    with pytest.raises(ValueError, match="no luck"), watch:
        raise ValueError("no luck" if len(threading.enumerate()) > len(before) else "none")
    assert threading.enumerate() == before


def test_nothing_is_started_before_it_is_entered():
    before = threading.enumerate()
    watchdog()
    assert threading.enumerate() == before
