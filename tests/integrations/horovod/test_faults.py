# SPDX-License-Identifier: Apache-2.0
"""A rank that dies or stands still in our broadcast, beside Horovod: nothing hangs."""

from __future__ import annotations

import pytest

from tests.integrations.horovod.playing import play

SCENES = "tests.integrations.horovod.scenes.failing"


def test_a_rank_killed_in_our_broadcast_ends_the_job():
    played = play(f"{SCENES}:killed_within", 3)
    assert played.job.code == 137, played.job.text
    assert played.results == {}


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_rank_that_stands_still_is_told_of(when):
    played = play(f"{SCENES}:stopped", 3, when)
    first, second, stopped = played.all
    for found in (first, second):
        assert found["told"].startswith("CollectiveError: ")
        assert found["seconds"] < 20
    if when == "within":
        for found in (first, second):
            assert "rank 2 on " in found["told"]
            assert "of 3 did not arrive within 2 s" in found["told"]
        assert "the others gave up waiting for this rank" in stopped["told"]
    else:
        assert "not all of the 3 ranks arrived within 2 s" in first["told"]
    assert all(found["untouched"] for found in played.all)
