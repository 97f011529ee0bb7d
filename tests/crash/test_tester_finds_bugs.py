# SPDX-License-Identifier: Apache-2.0
"""The testers are tested: each weakened library must be caught, by the right verdict."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from types import SimpleNamespace

import pytest

from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.leaves.leaf import Gate
from mpi_ckpt.states.buffers.array_bytes import ArrayBuffer
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import catalog, finding, recovery
from mpi_ckpt.storage.directory import checkpoint_directory as directory
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.owning import ownership
from mpi_ckpt.storage.reading import file_reader, reader
from mpi_ckpt.storage.writing import partial
from tests.crash import faults, scenarios
from tests.crash.crashes import judge_crashes
from tests.crash.recorder import in_place_of_os
from tests.crash.world import Training
from tests.draws import COUNTS, JUDGED, SEED

real_sync_directory = filesystem.sync_directory


@pytest.fixture(autouse=True)
def uncounted():
    """What is tried on a weakened library is no merit of the library."""
    counts, judged = COUNTS.copy(), JUDGED.copy()
    yield
    COUNTS.clear()
    COUNTS.update(counts)
    JUDGED.intersection_update(judged)


def verdicts(scenario):
    return judge_crashes(scenario, SEED, samples=20, limit=200).kinds


def skip_sync_of(monkeypatch, ends):
    """Do not fsync directories whose name satisfies a condition."""

    def weak(path, **how):
        if not ends(path.name):
            real_sync_directory(path, **how)

    monkeypatch.setattr(filesystem, "sync_directory", weak)


def test_no_fsync_of_files(monkeypatch):
    monkeypatch.setattr(filesystem, "sync_file", lambda _: None)
    assert verdicts(scenarios.next_save())["TORN"] > 0


def test_no_fsync_of_directories(monkeypatch):
    monkeypatch.setattr(filesystem, "sync_directory", lambda *_, **__: None)
    found = verdicts(scenarios.next_save())
    assert found["LOST"] > 0
    assert found["TORN"] > 0


def test_no_fsync_of_the_partial(monkeypatch):
    skip_sync_of(monkeypatch, lambda name: name.startswith(".partial"))
    assert verdicts(scenarios.next_save())["TORN"] > 0


def test_no_fsync_of_the_parent_after_publishing(monkeypatch):
    skip_sync_of(monkeypatch, lambda name: name == scenarios.ROOT)
    assert verdicts(scenarios.next_save())["LOST"] > 0


def test_no_fsync_of_parents_that_were_made(monkeypatch):
    skip_sync_of(monkeypatch, lambda name: name in ("made", "on", "the"))
    assert verdicts(scenarios.first_save())["NONE"] > 0


def test_no_fsync_of_a_parent_that_a_killed_job_made(monkeypatch):
    skip_sync_of(monkeypatch, lambda name: name.startswith("mpi_ckpt-crash"))
    first = scenarios.first_save()
    made = next(number for number, op in enumerate(first.ops, 1) if op.kind == "mkdir")
    assert verdicts(scenarios.killed_then_recovered(first, made))["NONE"] > 0


def test_manifest_is_renamed_before_its_bytes_are_durable(monkeypatch):
    def early(self, manifest):
        with filesystem.create_file(self.path / "manifest.json") as descriptor:
            filesystem.write_all(descriptor, manifest, 0)
            target = self._root / generation_name(self.generation)
            filesystem.sync_directory(self.path)
            filesystem.rename_new(self.path, target)
            filesystem.sync_directory(self._root)
            filesystem.sync_file(descriptor)
        return target

    monkeypatch.setattr(partial.Partial, "publish", early)
    assert verdicts(scenarios.next_save())["TORN"] > 0


class SlowDisk:
    """An ``os`` whose disk is slower than the program: nothing is durable until told."""

    def __init__(self, inner):
        self._inner = inner
        self.told = threading.Event()

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def fsync(self, descriptor):
        if threading.current_thread() is not threading.main_thread():
            assert self.told.wait(60)
        self._inner.fsync(descriptor)


def test_acknowledged_when_it_is_only_staged():
    disks = []

    def slow(recorder):
        disks.append(SlowDisk(recorder))
        return disks[-1]

    def program(run):
        with run.start(asynchronous=True) as training:
            number, _ = run.start_save(training, 2)
            run.recorder.mark(number)
            disks[-1].told.set()

    base, saves = scenarios.saved_image([1])
    scenario = scenarios.Scenario("early", base, saves=saves, acked=0)
    assert verdicts(scenarios.record(scenario, program, slow))["LOST"] > 0


def test_prune_without_fsync_of_the_parent(monkeypatch):
    def remove(self, numbers, job):
        # As in the library, but for the fsync between the renames and the deletions.
        for number in numbers:
            target = self.root / f".partial-{number:08d}-{job}"
            filesystem.rename_new(self.root / generation_name(number), target)
            filesystem.remove_tree(target)

    monkeypatch.setattr(catalog.Catalog, "remove", remove)
    assert verdicts(scenarios.saves_that_prune(1))["TORN"] > 0


def test_prune_in_place(monkeypatch):
    def remove(self, numbers, job):
        for number in numbers:
            filesystem.remove_tree(self.root / generation_name(number))

    monkeypatch.setattr(catalog.Catalog, "remove", remove)
    assert verdicts(scenarios.saves_that_prune(1))["TORN"] > 0


def test_sweep_without_fsync_of_the_parent(monkeypatch):
    def sweep(root, partials, job):
        for name in partials:
            filesystem.remove_tree(root / name)
        return True

    monkeypatch.setattr(recovery, "sweep", sweep)
    # Whether directories can be fsynced is found out by doing so, before the sweep.
    unsynced = {**vars(filesystem), "sync_directory": lambda *_, **__: None}
    monkeypatch.setattr(ownership, "filesystem", SimpleNamespace(**unsynced))
    first = scenarios.saves_that_prune(1)
    renamed = [
        number
        for number, op in enumerate(first.ops, 1)
        if op.kind == "rename" and ".partial" in op.target
    ]
    assert verdicts(scenarios.killed_then_recovered(first, renamed[-1]))["TORN"] > 0


def test_no_sweep(monkeypatch):
    scenario = scenarios.sweep()
    monkeypatch.setattr(recovery, "sweep", lambda *_: None)
    assert verdicts(scenario)["LEFTOVER"] > 0


def save_with_failing_fsync(number):
    """Record a save of which one fsync fails, whatever the library makes of it."""
    fault = faults.Fault("fsync", number, errno.EIO)

    def program(run):
        with run.start() as training, contextlib.suppress(CheckpointError):
            run.save(training, 2)

    base, saves = scenarios.saved_image([1])
    scenario = scenarios.Scenario("one fsync fails", base, saves=saves, acked=0)
    made = []

    def wrap(inner):
        made.append(faults.Faulty(fault, inner))
        return made[-1]

    try:
        return scenarios.record(scenario, program, wrap)
    finally:
        for faulty in made:
            faulty.close_kept()


def test_withdrawn_generation_is_deleted_at_once(monkeypatch):
    def withdraw(self, target, cause):
        filesystem.rename_new(target, self.path)

    monkeypatch.setattr(partial.Partial, "_withdraw", withdraw)
    runs = [save_with_failing_fsync(number) for number in range(1, 8)]
    withdrawn = [run for run in runs if sum(op.kind == "rename" for op in run.ops) == 2]
    assert len(withdrawn) == 1
    assert verdicts(withdrawn[0])["TORN"] > 0


def test_failed_fsync_of_a_directory_is_ignored(monkeypatch):
    def careless(path, **how):
        with contextlib.suppress(OSError):
            real_sync_directory(path, **how)

    monkeypatch.setattr(filesystem, "sync_directory", careless)
    runs = [save_with_failing_fsync(number) for number in range(1, 8)]
    acked = [run for run in runs if run.ops[-1].kind == "mark"]
    assert any(verdicts(run)["LOST"] > 0 for run in acked)


# The table of faults.


def workload(name):
    return next(workload for workload in faults.workloads() if workload.name == name)


def table(name, errnos=(errno.EIO,)):
    return faults.run_table(workload(name), errnos).wrong


def test_fault_table_sees_an_fsync_that_is_tried_again(monkeypatch):
    def stubborn(descriptor):
        try:
            filesystem.os.fsync(descriptor)
        except OSError:
            filesystem.os.fsync(descriptor)

    monkeypatch.setattr(filesystem, "sync_file", stubborn)
    assert any("fsync again" in line for line in table("save with prune"))


def test_fault_table_sees_a_prune_that_fails_a_save(monkeypatch):
    def strict(self, policy):
        there = self.generations()
        kept = policy.keep(there)
        return tuple(
            summary.generation for summary in there if summary.generation not in kept
        )

    monkeypatch.setattr(catalog.Catalog, "choose", strict)
    assert any("expected Saved(step=3" in line for line in table("save with prune"))


def test_fault_table_sees_leftovers(monkeypatch):
    monkeypatch.setattr(recovery, "sweep", lambda *_: None)
    assert any("left behind" in line for line in table("save after a crash"))


# Listings that lie.


def lies(name, kind):
    return faults.run_lies(workload(name), (kind,)).wrong


def test_catalog_that_believes_any_listing(monkeypatch):
    monkeypatch.setattr(catalog.Catalog, "_hidden", lambda *_: "")
    assert any("came back under the fault" in line for line in lies("fallback", "short"))
    assert any("came back under" in line for line in lies("restore after a crash", "empty"))


def test_catalog_that_believes_the_first_listing(monkeypatch):
    monkeypatch.setattr(catalog, "settled_survey", catalog.survey)
    assert any("left behind" in line for line in lies("save after a crash", "empty"))


def test_numbers_that_are_those_of_one_listing(monkeypatch):
    """One that was set aside is given again, as the quarantine shows nothing."""
    real = catalog.Catalog.look

    def forgetful(self):
        found = real(self)
        self.highest = 0
        return found

    monkeypatch.setattr(catalog.Catalog, "look", forgetful)
    wrong = lies("save after a fallback", "empty")
    assert any("number 2 was given again" in line for line in wrong)


def test_generations_that_are_set_aside_at_the_first_look(monkeypatch):
    monkeypatch.setattr(finding, "_PASSING", ())
    monkeypatch.setattr(file_reader, "_is_listed", lambda *_: False)
    monkeypatch.setattr(directory, "open_twice", reader.GenerationReader)
    wrong = table("restore after a crash", (errno.ENOENT,))
    assert any("came back under the fault" in line for line in wrong)


def test_training_that_does_not_wait_for_a_late_copy(monkeypatch, tmp_path):
    real = ArrayBuffer.copy_to

    def slowly(buffer, target):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.01)
        real(buffer, target)

    monkeypatch.setattr(ArrayBuffer, "copy_to", slowly)
    late, never = workload("overlapped save"), faults.Fault("fsync", 1000, errno.EIO)
    assert faults.attempt(late, never, tmp_path).wrong == []
    monkeypatch.setattr(Gate, "wait", lambda _: None)
    wrong = faults.attempt(late, never, tmp_path).wrong
    assert any("restored Saved(step=5, arrays=6" in line for line in wrong)


def test_short_writes_that_are_not_continued(monkeypatch, tmp_path):
    def once(descriptor, data, offset):
        filesystem.os.pwrite(descriptor, data, offset)

    monkeypatch.setattr(filesystem, "write_all", once)
    with in_place_of_os(faults.Short(1000)), Training(tmp_path) as training:
        training.save(5)
        with pytest.raises(CheckpointError):
            training.restore()
