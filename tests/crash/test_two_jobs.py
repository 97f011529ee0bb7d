# SPDX-License-Identifier: Apache-2.0
"""Two jobs on one directory, in rounds that are drawn; `scripts/two_jobs` does many."""

from __future__ import annotations

import pytest

from tests.crash.crashes import quiet_scratch
from tests.crash.two_jobs import Rounds
from tests.draws import COUNTS, SEED, TIMES


@pytest.mark.mpi
@pytest.mark.timeout(300 * TIMES)
def test_two_jobs_lose_nothing_of_one_another():
    with quiet_scratch() as folder:
        rounds = Rounds(folder / "rounds", SEED)
        rounds.run(scenes=3 * TIMES)
    assert rounds.counts["saves"] > 10
    assert rounds.counts["taken over"] > 1
    COUNTS["rounds of two jobs"] += rounds.counts["rounds"]
