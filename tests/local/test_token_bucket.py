# SPDX-License-Identifier: Apache-2.0
"""How fast bytes pass, by a clock that only moves while the taker waits."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest

from mpi_ckpt.engine.hosts.copying.token_bucket import Stopped, TokenBucket


class Clock:
    now = 0.0

    def pause(self, event, seconds):
        self.now += seconds


def bucket(rate):
    clock = Clock()
    return clock, TokenBucket(rate, lambda: clock.now, clock.pause)


def test_bytes_pass_at_the_rate():
    clock, one = bucket(100.0)
    for _ in range(50):
        one.take(30)
    assert clock.now == pytest.approx(15.0)


def test_time_lost_elsewhere_is_made_up_for_within_limits():
    clock, one = bucket(1 << 20)
    clock.now = 32.0
    one.take(48 << 20)
    assert clock.now == pytest.approx(48.0)
    clock.now += 1000.0  # the bucket holds 64 MiB, however long it stood there
    before = clock.now
    one.take(65 << 20)
    assert clock.now - before == pytest.approx(1.0)


def test_an_open_bucket_lets_all_pass_and_a_stopped_one_nothing():
    clock, one = bucket(1.0)
    one.open()
    one.take(1 << 40)
    assert clock.now == 0.0
    one.stop()
    with pytest.raises(Stopped):
        one.take(1)


@pytest.mark.parametrize("how", ["open", "stop"])
def test_a_waiting_taker_is_released(how):
    one, ended = TokenBucket(1.0), threading.Event()

    def take():
        with suppress(Stopped):
            one.take(1 << 40)
        ended.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not ended.wait(0.05)
    getattr(one, how)()
    assert ended.wait(30.0)
    thread.join()
