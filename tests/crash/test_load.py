# SPDX-License-Identifier: Apache-2.0
"""A short form of scripts/soak: many saves, a slow disk, faults; nothing lost or leaked."""

from __future__ import annotations

import json

import pytest

from tests.draws import COUNTS, SEED
from tests.launch import run_job

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(900)]

SAVES, TURN = 60, 5


def soak(ranks, directory, *more):
    """Run the program; scripts/soak judges memory and the slowest, of a thousand saves."""
    command = ["-m", "tests.crash.programs.soak", str(directory), "--saves", str(SAVES)]
    command += ["--turn", str(TURN), "--mib", "4", "--delay", "0.01", "--seed", str(SEED)]
    return run_job(ranks, [*command, "--growth", "0.2", *more], timeout=800)


@pytest.mark.parametrize("more", [[], ["--cut"]], ids=["whole", "cut"])
def test_nothing_is_lost_or_left_by_many_saves_under_faults(tmp_path, more):
    outcome = soak(2, tmp_path, *more)
    assert outcome.code == 0, outcome.text
    report = json.loads(outcome.out)
    assert report["wrong"] == []
    assert report["faults"] == SAVES // 20
    assert report["acknowledged"] == SAVES - sum(report["failed"].values())
    assert report["acknowledged"] >= SAVES - report["faults"]
    assert 3 <= report["most_generations_at_once"] <= 4
    COUNTS["saves under load"] += SAVES


def test_growth_and_slow_saves_are_found(tmp_path):
    quick = ["--saves", "45", "--mib", "1", "--delay", "0"]
    # Not less than the median is the slowest on any machine.
    outcome = soak(1, tmp_path, *quick, "--growth", "-1", "--slowest", "0.9")
    assert outcome.code == 1
    assert "memory of rank 0 grew by" in outcome.out
    assert "one save in a hundred takes" in outcome.out
