# SPDX-License-Identifier: Apache-2.0
"""Says at the end of a run what was tried, and with which seed to try it again."""

from __future__ import annotations

import pytest

from tests.crash.faults import quiet
from tests.crash.tracing import why_not
from tests.crash.world import COUNTS, JUDGED
from tests.draws import SEED


def pytest_terminal_summary(terminalreporter):
    counts = {"distinct crash states": len(JUDGED), **COUNTS}
    tried = ", ".join(f"{number} {what}" for what, number in counts.items())
    terminalreporter.write_line(f"crash tests: MPI_CKPT_TEST_SEED={SEED}; {tried}")


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
