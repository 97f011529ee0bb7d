# SPDX-License-Identifier: Apache-2.0
"""The check that every test here runs under sees a leak, and waits for what is ending."""

from __future__ import annotations

import os
import threading

import pytest

from tests import leaks
from tests.leaks import nothing_left


def test_descriptor_and_thread_that_stay_are_found(monkeypatch):
    monkeypatch.setattr(leaks, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(leaks, "_PAUSE_SECONDS", 0.05)
    with pytest.raises(AssertionError, match="/dev/null"), nothing_left():
        file = os.open(os.devnull, os.O_RDONLY)
    os.close(file)
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="a sleeper")
    with pytest.raises(AssertionError, match="a sleeper"), nothing_left():
        thread.start()
    end.set()
    thread.join()


def test_thread_that_ends_soon_after_is_no_leak():
    with nothing_left():
        threading.Timer(0.2, lambda: None).start()
