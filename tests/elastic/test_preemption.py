# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from mpi_ckpt.elastic.preemption import DEFAULT_SIGNALS, PreemptionGuard
from tests.waiting import limit


@pytest.fixture(autouse=True)
def _handlers():
    """Put every handler back, whatever a test did."""
    before = {number: signal.getsignal(number) for number in DEFAULT_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", DEFAULT_SIGNALS)
def test_signal_becomes_a_flag_with_a_reason(number):
    with PreemptionGuard() as guard:
        assert (guard.requested, guard.reason) == (False, "")
        send(number)
        assert (guard.requested, guard.reason) == (True, number.name)


def test_first_signal_is_the_reason():
    with PreemptionGuard() as guard:
        send(signal.SIGUSR2)
        send(signal.SIGTERM)
        assert guard.reason == "SIGUSR2"


def test_handlers_that_were_there_are_called_as_well():
    called = []
    signal.signal(
        signal.SIGTERM, lambda number, frame: called.append((number, frame is not None))
    )
    with PreemptionGuard() as guard:
        send(signal.SIGTERM)
        assert guard.requested
    assert called == [(signal.SIGTERM, True)]


def test_guards_chain():
    with PreemptionGuard() as outer, PreemptionGuard([signal.SIGTERM]) as inner:
        send(signal.SIGTERM)
        assert outer.requested
        assert inner.requested


def test_ignored_signal_is_noted():
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with PreemptionGuard() as guard:
        send(signal.SIGUSR1)
        assert guard.requested
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_second_interrupt_interrupts():
    with PreemptionGuard() as guard:
        send(signal.SIGINT)
        assert guard.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_interrupt_after_another_request_interrupts():
    with PreemptionGuard():
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_repeated_requests_to_stop_are_one():
    with PreemptionGuard() as guard:
        for _ in range(3):
            send(signal.SIGTERM)
        assert guard.requested


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None])
def test_uninstall_puts_back_what_was_there(before):
    signal.signal(signal.SIGUSR1, before)
    guard = PreemptionGuard([signal.SIGUSR1])
    assert guard.install()
    assert signal.getsignal(signal.SIGUSR1) == guard._note
    guard.uninstall()
    assert signal.getsignal(signal.SIGUSR1) == before
    guard.uninstall()


def test_who_took_the_signal_after_us_keeps_it():
    def later(*_):
        pass

    guard = PreemptionGuard([signal.SIGUSR1])
    guard.install()
    signal.signal(signal.SIGUSR1, later)
    guard.uninstall()
    assert signal.getsignal(signal.SIGUSR1) is later


def test_installing_twice_keeps_the_first_previous_handler():
    before = signal.getsignal(signal.SIGTERM)
    guard = PreemptionGuard()
    guard.install()
    guard.install()
    guard.uninstall()
    assert signal.getsignal(signal.SIGTERM) == before


def test_uninstalled_guard_can_be_installed_again():
    guard = PreemptionGuard([signal.SIGUSR1])
    with guard:
        pass
    with guard:
        send(signal.SIGUSR1)
    assert guard.requested


def test_no_signals_install_nothing():
    before = [signal.getsignal(number) for number in DEFAULT_SIGNALS]
    with PreemptionGuard(()) as guard:
        assert [signal.getsignal(number) for number in DEFAULT_SIGNALS] == before
        assert not guard.requested


def test_other_threads_can_install_nothing():
    before = signal.getsignal(signal.SIGTERM)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(PreemptionGuard().install()))
    thread.start()
    thread.join()
    assert answers == [False]
    assert signal.getsignal(signal.SIGTERM) == before


CHILD = """
import os, signal, sys, time
from mpi_ckpt.elastic.preemption import PreemptionGuard

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
guard = PreemptionGuard()
guard.install()
# Python drops signals that come before a fork has returned.
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    try:
        for _ in range(600):
            os.write(tell, b"1")  # one at the start, and one after each signal
            time.sleep(0.05)
    except KeyboardInterrupt:
        os._exit(42)
    os._exit(0)
for name in sys.argv[1:]:
    os.read(ready, 1)
    os.kill(child, getattr(signal, name))
    time.sleep(0.2)
    os.set_blocking(ready, False)
    try:
        os.read(ready, 1000)
    except BlockingIOError:
        pass
    os.set_blocking(ready, True)
_, status = os.waitpid(child, 0)
ended = os.waitstatus_to_exitcode(status)
print({42: "interrupted", 0: "alive"}.get(ended, -ended), guard.requested)
"""


@pytest.mark.parametrize(
    ("names", "end"),
    [
        (["SIGTERM"], "15"),
        # A scheduler's request for a save goes to workers as well, which must live on.
        (["SIGUSR1", "SIGUSR1", "SIGUSR2", "SIGTERM"], "15"),
        (["SIGINT", "SIGTERM"], "15"),
        (["SIGINT", "SIGINT"], "interrupted"),
    ],
)
def test_forked_child_reacts_to_no_request_and_its_parent_hears_nothing(names, end):
    command = [sys.executable, "-c", CHILD, *names]
    told = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=limit(60)
    ).stdout
    assert told.split() == [end, "False"]


BEFORE = """
import os, signal, sys
from mpi_ckpt.elastic.preemption import PreemptionGuard

calls = []
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
guard = PreemptionGuard()
guard.install()
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), guard.requested)
"""


def test_forked_child_still_calls_the_handler_that_was_there():
    command = [sys.executable, "-c", BEFORE]
    told = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=limit(60)
    ).stdout
    assert told.split() == ["7", "False"]


def test_one_that_is_done_lets_pass_what_asks_the_others_for_a_save():
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    guard = PreemptionGuard()
    guard.install()
    guard.retire()
    guard.retire()
    send(signal.SIGUSR1)  # would end this process
    assert not guard.requested
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with PreemptionGuard() as another:
        send(signal.SIGUSR1)
        assert another.reason == "SIGUSR1"


def test_one_that_is_done_gives_back_a_handler_of_the_program():
    called = []
    signal.signal(signal.SIGUSR1, lambda *_: called.append(1))
    guard = PreemptionGuard()
    guard.install()
    guard.retire()
    send(signal.SIGUSR1)
    assert called == [1]


def test_interrupt_is_left_to_python_while_nobody_looks():
    with PreemptionGuard() as guard:
        guard.is_heeded = False
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_interrupt_says_what_it_does(capfd):
    with PreemptionGuard(tells=True):
        send(signal.SIGTERM)
        assert capfd.readouterr().err == ""
    with PreemptionGuard(tells=True):
        send(signal.SIGINT)
        assert "saves at the next step() and stops; press again" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert capfd.readouterr().err == ""


def test_who_took_a_signal_is_noticed():
    with PreemptionGuard() as guard:
        assert guard.displaced() == []
        signal.signal(signal.SIGUSR2, lambda *_: None)
        assert guard.displaced() == ["SIGUSR2"]
