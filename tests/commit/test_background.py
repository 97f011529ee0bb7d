# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mpi_ckpt.engine.save.background import Background
from tests.waiting import limit


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


def test_close_waits_no_longer_than_it_is_told(background):
    gate = threading.Event()
    future = background.submit(lambda: gate.wait(10))
    assert not background.join(0.01)
    assert not background.close(0.01)
    gate.set()
    assert future.result()
    assert background.close()


def test_thread_ends_when_nobody_holds_it():
    before = set(threading.enumerate())
    background = Background()
    done = []
    background.submit(lambda: done.append(1))
    (thread,) = set(threading.enumerate()) - before
    del background
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    assert done == [1], "what was submitted is carried out all the same"


PROGRAM = """
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor
from mpi_ckpt.engine.save.background import Background

def work():
    time.sleep({work})
    with ThreadPoolExecutor(1) as pool:
        pool.submit(print, "done by a pool").result()

def give_up():
    print("gave up", flush=True)
    {give_up}

def late():
    print("late:", background.submit(lambda: "here").result())

background = Background({seconds}, give_up)
atexit.register(late)
background.submit(work)
sys.exit(3)
"""


def run(**given):
    program = PROGRAM.format(**given)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=limit(50)
    )


@pytest.mark.skipif(
    sys.version_info[:3] in ((3, 12, 0), (3, 12, 1)),
    reason="this Python starts no thread once the program is at its end",
)
def test_at_exit_work_is_finished_and_later_work_is_done_at_once():
    done = run(seconds=30, work=3, give_up="")
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == ["done by a pool", "late: here"]


def test_at_exit_work_is_given_up_after_a_while():
    done = run(seconds=0.01, work=60, give_up="import os; os._exit(4)")
    assert (done.returncode, done.stdout) == (4, "gave up\n"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads")
def test_the_thread_and_what_it_starts_give_way_to_the_training(background):
    def priority():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def priorities():
        with ThreadPoolExecutor(1) as pool:
            return priority(), pool.submit(priority).result()

    before = priority()
    theirs = background.submit(priorities).result()
    assert theirs == (min(before + 5, 19),) * 2
    assert priority() == before
