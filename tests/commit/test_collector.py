# SPDX-License-Identifier: Apache-2.0
import gc
import threading

import pytest

from mpi_ckpt.collector import without_collections


@pytest.fixture(autouse=True)
def enabled():
    assert gc.isenabled()
    yield
    gc.enable()


def test_paused_while_it_runs_and_working_again_after():
    assert without_collections()(gc.isenabled)() is False
    assert gc.isenabled()
    with without_collections():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_working_again_after_a_failure():
    @without_collections()
    def fail():
        raise ValueError("whatever")

    with pytest.raises(ValueError, match="whatever"):
        fail()
    assert gc.isenabled()


def test_one_that_the_program_has_switched_off_stays_off():
    gc.disable()
    without_collections()(gc.isenabled)()
    assert not gc.isenabled()


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_threads_in_any_order_leave_it_working(first_out):
    entered = [threading.Event() for _ in range(2)]
    leave = [threading.Event() for _ in range(2)]

    @without_collections()
    def stay(number):
        entered[number].set()
        leave[number].wait(10)

    threads = []
    for number in range(2):
        threads.append(threading.Thread(target=stay, args=(number,)))
        threads[-1].start()
        assert entered[number].wait(10)
    for number in (first_out, 1 - first_out):
        leave[number].set()
        threads[number].join(10)
    assert gc.isenabled()
