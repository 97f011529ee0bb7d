# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from mpi_ckpt.comm.presence import Presence, _look_up
from tests.waiting import wait_for


@pytest.fixture
def child():
    command = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def presence_of(process):
    _, started = _look_up(process)
    return Presence(socket.gethostname(), process, started)


def test_it_travels_as_bytes_of_one_length():
    own = Presence.own()
    assert own.process == os.getpid()
    assert own.started > 0
    long = replace(own, host="ü" * 100)
    for presence in (own, long):
        encoded = presence.encode()
        assert encoded.nbytes == Presence.nbytes
        again = Presence.decode(encoded.tobytes())
        assert replace(again, host=presence.host) == presence
    assert Presence.decode(own.encode().tobytes()) == own


def test_what_a_process_is_at(child):
    presence = presence_of(child.pid)
    assert presence.is_visible
    assert wait_for(lambda: presence.describe().startswith(f"process {child.pid} waits"))
    child.send_signal(signal.SIGSTOP)
    stopped = f"process {child.pid} is stopped by a signal"
    assert wait_for(lambda: presence.describe() == stopped)
    child.kill()
    assert wait_for(lambda: presence.describe() == f"process {child.pid} has died")
    child.wait()
    assert presence.describe() == f"process {child.pid} is not there any more"
    assert not presence.is_visible


def test_another_process_of_the_same_number_is_not_mistaken_for_it():
    own = Presence.own()
    assert own.is_visible
    assert "is running" in own.describe()
    other = replace(own, started=own.started + 1)
    assert not other.is_visible
    assert other.describe() == f"process {own.process} is not there any more"
