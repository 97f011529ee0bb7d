# SPDX-License-Identifier: Apache-2.0
"""Every call of every kind fails, with every error: right result or one clear error."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpi_ckpt.errors import OptionsError, SaveError
from mpi_ckpt.storage.directory import catalog
from mpi_ckpt.storage.owning import lock
from tests.crash import faults
from tests.crash.faults import (
    CALLS,
    ERRNOS,
    LIES,
    Fault,
    Lie,
    Short,
    assert_soon,
    run_lies,
    run_table,
)
from tests.crash.recorder import in_place_of_os
from tests.crash.world import Saved, Training
from tests.draws import COUNTS, SEED, STRESS, TIMES
from tests.launch import run_job

WORKLOADS = {workload.name: workload for workload in faults.workloads()}

# What each workload does at least once, so that its faults did fire.
USES = {
    "first save": {"open", "pwrite", "fsync", "mkdir", "rename", "listdir"},
    "save after a crash": {"open", "pwrite", "fsync", "unlink", "rmdir", "lstat"},
    "save with prune": {"open", "pwrite", "fsync", "rename", "unlink", "rmdir", "lstat"},
    "carrying save": {"link", "preadv", "pwrite", "fsync", "rename"},
    "sharing save": {"link", "open", "pwrite", "fsync", "rename", "preadv"},
    "direct save": {"open", "pwrite", "fsync", "posix_fallocate", "ftruncate"},
    "asynchronous save": {"open", "pwrite", "fsync", "rename", "unlink"},
    "overlapped save": {"open", "pwrite", "fsync", "mkdir", "rename", "unlink", "rmdir"},
    "restore after a crash": {"open", "preadv", "listdir", "unlink", "rmdir", "lstat"},
    "save after a fallback": {"open", "pwrite", "fsync", "mkdir", "rename", "listdir"},
    "fallback": {"open", "preadv", "mkdir", "rename", "pwrite", "fsync"},
}

# These get eight errors, drawn by the seed, in a default run, and the others two.
WITH_MOST_ERRORS = ("first save", "save with prune", "restore after a crash")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """A listing that goes on lying is looked at again, after pauses that show nothing."""
    monkeypatch.setattr(catalog, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))


PROGRAM = str(Path(__file__).parent / "programs" / "fault_table.py")


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_any_call_may_fail(name, forever):
    number = len(ERRNOS)
    if not STRESS:
        few = forever or name not in WITH_MOST_ERRORS
        number = min(number, (2 if few else 8) * TIMES)
    errnos = random.Random(f"{SEED} {name}").sample(ERRNOS, number)
    table = run_table(WORKLOADS[name], errnos, forever=forever)
    assert not table.wrong, str(table)
    assert table.calls >= USES[name]
    # Most faults are told; what is tolerated on purpose is a minority of no small size.
    assert 0 < table.raised <= table.fired


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_any_listing_may_lie(name, forever):
    """It is empty, an old one, or lacks names: right result, or one refusal."""
    rng = random.Random(f"{SEED} {name} {forever}")
    kinds = LIES if STRESS else rng.sample(LIES, min(TIMES, len(LIES)))
    table = run_lies(WORKLOADS[name], kinds, forever=forever)
    assert not table.wrong, str(table)
    assert table.fired >= 3 * len(kinds)
    # One that lies once is looked at again.
    assert forever or table.raised == 0


def test_faults_of_a_prune_do_not_fail_the_save():
    """All that happens once every rank has acknowledged is logged, never raised."""
    table = run_table(WORKLOADS["save with prune"], (errno.EIO,))
    plain = run_table(WORKLOADS["save after a crash"], (errno.EIO,))
    assert table.fired - table.raised > 20
    assert table.raised <= plain.raised


@pytest.mark.parametrize("most", [1, 7, 4095, 4096, 4097])
@pytest.mark.parametrize("name", WORKLOADS)
def test_short_writes_and_reads_are_continued(name, most, tmp_path):
    workload = WORKLOADS[name]
    faults.write_image(workload.base, tmp_path)
    root, short = tmp_path / workload.root, Short(most)
    options = {"keep": 1, **workload.options}
    with in_place_of_os(short), Training(root, **options) as training:
        workload.prepare(training)
        workload.act(training)
        assert training.restore() == workload.after
    assert short.cut > 0
    with Training(tmp_path / workload.root) as training:
        assert training.restore() == workload.after


def test_a_write_of_no_bytes_is_an_error(tmp_path):
    class Stuck(Short):
        def pwrite(self, descriptor, data, offset):
            return 0

    with Training(tmp_path) as training:
        training.save(1)
        with in_place_of_os(Stuck(0)), pytest.raises(OSError, match="failed: EIO"):
            training.save(2)
        assert training.restore() == Saved.of(1)


@pytest.mark.parametrize("call", ["open", "flock"])
@pytest.mark.parametrize("code", [*ERRNOS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_a_lock_nothing_is_saved_but_all_is_restored(
    call, code, tmp_path, monkeypatch
):
    """The lock file holds no data and is not opened through the seam."""

    def fail(path, *_):
        name = str(path) if call == "open" else None
        raise OSError(code, os.strerror(code), name)

    with Training(tmp_path) as training:
        training.save(1)
    with monkeypatch.context() as patch:
        if call == "open":
            stand_in = SimpleNamespace(**{**vars(os), "open": fail})
            patch.setattr(lock, "os", stand_in)
        else:
            patch.setattr(lock.fcntl, "flock", fail)
        is_missing = call == "flock" and code in (errno.ENOLCK, errno.EOPNOTSUPP)
        refused = OptionsError if is_missing else SaveError
        with Training(tmp_path, read_only=True if is_missing else None) as training:
            assert training.restore() == Saved.of(1)
        with Training(tmp_path) as training:
            with pytest.raises(refused, match=errno.errorcode[code]) as caught:
                training.restore() if is_missing else training.save(2)
            assert str(tmp_path / ".lock") in str(caught.value)
            assert caught.value.errno == code
    with Training(tmp_path) as training:
        training.save(3)
        assert training.restore() == Saved.of(3)


def test_a_generation_deleted_by_hand_is_missed_once(tmp_path):
    with Training(tmp_path) as training:
        training.save(1)
        training.save(2)
        shutil.rmtree(tmp_path / "checkpoint-00000002")
        with pytest.raises(OSError, match="ENOENT"):
            training.save(3, only=["plain"])
        training.save(4, only=["plain"])
        assert training.restore() == Saved(4, 1, 4)


@pytest.mark.mpi
@pytest.mark.timeout(300 * TIMES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_hear_of_a_fault(ranks, tmp_path):
    """One job goes through many faults of root; every rank must tell the same of each."""
    rng = random.Random(f"{SEED} {ranks}")
    drawn = [
        [name, 0, call, number, code, forever]
        for name in WORKLOADS
        for call in CALLS
        for number in (1, 2, 3)
        for code, forever in [(rng.choice(ERRNOS), rng.random() < 0.5)]
    ]
    drawn += [
        [name, 0, "listdir", number, rng.choice(LIES), rng.random() < 0.5]
        for name in WORKLOADS
        for number in (1, 2, 3, 4)
    ]
    rng.shuffle(drawn)
    fired = fired_faults(ranks, drawn, 240, tmp_path)
    assert fired > 60
    COUNTS[f"faults with {ranks} ranks"] += fired


@pytest.mark.mpi
@pytest.mark.timeout(300 * TIMES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_hear_of_a_fault_of_any_writer_or_reader(ranks, tmp_path):
    rng = random.Random(f"{SEED} joint {ranks}")
    drawn = [
        [workload.name, victim, call, number, rng.choice(ERRNOS), rng.random() < 0.5]
        for workload in faults.joint_workloads()
        for victim in range(ranks)
        for call in CALLS
        for number in (1, 2, 3)
    ]
    rng.shuffle(drawn)
    fired = fired_faults(ranks, drawn, 560 // ranks, tmp_path)
    assert fired > 20
    COUNTS[f"faults of any of {ranks} ranks"] += fired


def fired_faults(ranks, drawn, most, tmp_path):
    """Run one job through faults; return how many did happen."""
    asked, told = tmp_path / "asked", tmp_path / "told"
    asked.write_text(json.dumps(drawn if STRESS else drawn[: most * TIMES]))
    outcome = run_job(ranks, [PROGRAM, str(asked), str(told)], timeout=250 * TIMES)
    # Where it hung: after so many, or everything is slow.
    assert outcome.code == 0, f"{len(told.read_text().splitlines())} done; {outcome.text}"
    fired, seconds = 0, []
    for line in told.read_text().splitlines():
        report = json.loads(line)
        assert not report["wrong"], report
        errors = report["errors"]
        assert all(error == errors[0] for error in errors), report
        seconds.append(max(report["seconds"]))
        fired += report["fired"]
    assert_soon(seconds)
    return fired


@pytest.mark.mpi
def test_a_state_that_fails_on_one_rank_fails_on_all(tmp_path):
    """Files are root's, but load() runs everywhere: rank 1 fails, both raise the same."""
    program = str(Path(__file__).parent / "programs" / "failing_state.py")
    outcome = run_job(2, [program, str(tmp_path / "ckpt"), str(tmp_path / "told")])
    assert outcome.code == 0, outcome.text
    for errors in json.loads((tmp_path / "told").read_text()):
        assert errors[0] == errors[1]
        assert "rank 1 of 2" in errors[0][1] or "rank 0 of 2" in errors[0][1]
        assert "EIO" in errors[0][1] or "Input/output error" in errors[0][1]


def test_faults_have_names():
    told = str(Fault("fsync", 2, errno.EIO, forever=True))
    assert told == "fsync no. 2 fails with EIO from then on"
    assert str(Lie("listdir", 3, 0, kind="old")) == "listing no. 3 is old once"
