# SPDX-License-Identifier: Apache-2.0
"""Real power cuts, some of all that ``scripts/powercut`` tries."""

from __future__ import annotations

import random

import pytest

from mpi_ckpt.storage import filesystem
from tests.crash.crashes import quiet_scratch
from tests.crash.moments import Moment
from tests.crash.power_cuts import (
    KINDS,
    SHUTDOWNS,
    Cut,
    Disk,
    NotHereError,
    all_cuts,
    count_changes,
    cut_and_judge,
    run_cuts,
)
from tests.draws import COUNTS, SEED, STRESS, TIMES

CUTS = 14 * TIMES  # of all, on each file system, in a default run

pytestmark = pytest.mark.timeout(1800 if STRESS else 300)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def disk(request, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/sbin:/sbin", prepend=":")  # where mkfs is
    with quiet_scratch() as folder:
        try:
            yield Disk(folder, request.param)
        except NotHereError as error:
            pytest.skip(str(error))


def test_acknowledged_saves_survive_power_cuts(disk):
    cuts = all_cuts(disk)
    assert len(cuts) > 300
    chosen = cuts if STRESS else random.Random(SEED).sample(cuts, min(CUTS, len(cuts)))
    assert run_cuts(disk, chosen) == []
    COUNTS[f"power cuts of {disk.kind.name}"] += len(chosen)


def test_power_cuts_find_a_missing_fsync(disk, monkeypatch):
    monkeypatch.setattr(filesystem, "sync_file", lambda _: None)
    monkeypatch.setattr(filesystem, "sync_directory", lambda *_, **__: None)
    after_all = Moment(count_changes(disk, "blocking"), "after")
    for how in SHUTDOWNS:
        assert cut_and_judge(disk, Cut("blocking", how, after_all)), how
