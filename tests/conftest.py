# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that are alone in one process, and of those that start jobs.

The folder says how a test runs: in ``parallel`` on every rank of a job (see
`tests.every_rank`), in ``jobs`` it starts jobs and watches them, elsewhere it is alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import mpi_ckpt
from tests.draws import STRESS
from tests.jobs import Jobs, jobs_of_a_test
from tests.leaks import nothing_left
from tests.odd_disk import NotHereError, OddDisk, odd_disk
from tests.uncompiled import leave_out_compiler

if TYPE_CHECKING:
    from collections.abc import Iterator

leave_out_compiler()

# A shell lets its background jobs ignore SIGINT, and what tests start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.every_rank", "tests.tiers"]

settings.register_profile(
    "suite",
    deadline=None,  # shared machines stall; a hang is pytest-timeout's to end
    max_examples=1000 if STRESS else 50,
    derandomize=not STRESS,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def alone(request):
    """Give every test the same random streams; fail one that leaves something behind.

    And wait for no disk: what survives a power cut is the subject of tests/crash. Some
    tests sync hundreds of times, and a busy disk takes a second for one.
    """
    if request.path.parent.name in ("parallel", "jobs", "crash", "horovod"):
        return
    random.seed(1)
    np.random.seed(1)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1)
    request.getfixturevalue("no_leaks")
    request.getfixturevalue("monkeypatch").setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def no_leaks():
    """Nothing that a test opened or started is left when it ends."""
    # What MPI opens it keeps, and that is of no test: not even of the first.
    from mpi4py import MPI  # noqa: F401

    with nothing_left():
        yield


@pytest.fixture
def manage(tmp_path):
    """Make managers of one rank over one directory; all are closed when the test ends."""
    from mpi4py import MPI

    made = []

    def make(*states, root=tmp_path, **options) -> mpi_ckpt.CheckpointManager:
        options = mpi_ckpt.Options(preemption_signals=(), **options)
        made.append(
            mpi_ckpt.CheckpointManager(root, states, comm=MPI.COMM_SELF, options=options)
        )
        return made[-1]

    yield make
    for manager in reversed(made):
        manager.close()


@pytest.fixture
def odd_disks(tmp_path):
    """Mount file systems that lack something, or lie; skip where none can be had.

    Give a function that takes what `tests.odd_disk.odd_disk` does; all are unmounted when
    the test ends. In tests that may not wait for a disk, no fsync comes to it.
    """
    with contextlib.ExitStack() as stack:

        def mount(**switches: object) -> OddDisk:
            folder = Path(tempfile.mkdtemp(prefix="odd-", dir=tmp_path))
            try:
                return stack.enter_context(odd_disk(folder, **switches))
            except NotHereError as error:
                pytest.skip(str(error))

        yield mount


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    with jobs_of_a_test() as jobs:
        yield jobs


@pytest.fixture(scope="module")
def module_jobs() -> Iterator[Jobs]:
    with jobs_of_a_test() as jobs:
        yield jobs
