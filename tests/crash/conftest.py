# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of crashes and faults."""

from __future__ import annotations

import pytest

from tests.crash.faults import quiet
from tests.crash.tracing import why_not
from tests.draws import SEED


@pytest.fixture(scope="session")
def strace():
    """Skip what needs strace where it cannot be used."""
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def seed_and_silence():
    """Print the seed into the output of a failed test; keep thousands of warnings out."""
    print(f"MPI_CKPT_TEST_SEED={SEED}")
    with quiet():
        yield
