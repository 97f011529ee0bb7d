# SPDX-License-Identifier: Apache-2.0
"""Processes of other jobs, for tests of the lock and of the lease."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.waiting import limit


@pytest.fixture
def start_owner(tmp_path):
    """Start a program with the directory and a word as arguments; kill it at the end."""
    started = []

    def start(program: str, word: str) -> subprocess.Popen:
        command = [sys.executable, "-c", program, str(tmp_path), word]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=limit(30))
