# SPDX-License-Identifier: Apache-2.0
"""Below the file system: writes that never reached the disk, and a disk that fails."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from mpi_ckpt.errors import PublishError, SaveError
from mpi_ckpt.storage import filesystem
from tests.crash.block_device import LIFETIME, BlockDevice, NotHereError, mounted
from tests.crash.block_log import (
    ACKNOWLEDGED,
    FLUSH,
    WRITE,
    Cut,
    Record,
    acknowledged,
    decoded,
    disk_after,
    draw_cuts,
)
from tests.crash.crashes import quiet_scratch
from tests.crash.power_cuts import WAYS
from tests.crash.test_real_faults import refusal
from tests.crash.world import Saved, Training, judge
from tests.draws import COUNTS, SEED, STRESS, TIMES

IMAGES = 100 if STRESS else 12 * TIMES  # of each way to save
SAVES = 6

pytestmark = pytest.mark.timeout(1800 if STRESS else 2 * LIFETIME + 100)


@pytest.fixture
def folder(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/sbin:/sbin", prepend=":")  # where mkfs is
    with quiet_scratch() as folder:
        yield folder


@pytest.fixture
def device(folder):
    try:
        device = BlockDevice(folder)
        with device.plugged_in(), device.mounted():
            pass
    except NotHereError as error:
        pytest.skip(str(error))
    return device


def test_a_log_says_what_a_power_cut_leaves():
    records = [
        Record(WRITE, 0, b"ab"),
        Record(FLUSH),
        Record(WRITE, 1, b"xy"),
        Record(ACKNOWLEDGED, 0),
        Record(FLUSH),
        Record(WRITE, 3, b"z"),
        Record(ACKNOWLEDGED, 1),
    ]
    assert decoded(b"".join(record.encoded() for record in records)) == records
    cuts = set(draw_cuts(records, 9, random.Random(SEED)))
    assert (
        cuts
        == {
            Cut(1, frozenset()): None,
            Cut(1, frozenset({2})): None,
            Cut(4, frozenset()): None,
            Cut(4, frozenset({5})): None,
        }.keys()
    )
    lost, kept = Cut(1, frozenset()), Cut(4, frozenset({5}))
    assert (disk_after(b"....", records, lost), acknowledged(records, lost)) == (b"ab..", 0)
    assert (disk_after(b"....", records, kept), acknowledged(records, kept)) == (b"axyz", 1)


def saves_of(device, way):
    """Save some times on the device; return what was saved."""
    saves = [Saved.of(step) for step in range(1, SAVES + 1)]
    with (
        device.plugged_in(),
        device.mounted() as root,
        Training(root, keep=2, **WAYS[way]) as training,
    ):
        for index, saved in enumerate(saves):
            training.move(saved.step)
            training.manager.save(saved.step).wait()
            device.acknowledge(index)
            training.manager.wait()  # for what is pruned
    return saves


def judge_cut(folder, device, records, cut, saves):
    """Say what is wrong with the disk after a cut, mounted again, if anything."""
    image, where = folder / "image", folder / "again"
    where.mkdir(exist_ok=True)
    image.write_bytes(disk_after(device.first_contents(), records, cut))
    with mounted(image, where):
        return judge(where / "ckpt", saves, acknowledged(records, cut))


@pytest.mark.parametrize("way", WAYS)
def test_acknowledged_saves_are_on_the_disk(way, folder, device):
    saves = saves_of(device, way)
    records = device.records()
    cuts = draw_cuts(records, IMAGES, random.Random(SEED))
    assert len(cuts) == IMAGES
    assert acknowledged(records, Cut(len(records) - 1, frozenset())) == SAVES - 1
    faults = {cut: judge_cut(folder, device, records, cut, saves) for cut in cuts}
    assert {cut: fault for cut, fault in faults.items() if fault} == {}
    COUNTS["disks after a power cut"] += len(cuts)


@pytest.mark.parametrize("missing", ["sync_file", "sync_directory"])
def test_a_missing_flush_is_found(missing, folder, device, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(filesystem, missing, lambda *_, **__: None)
        saves = saves_of(device, "blocking")
    records = device.records()
    first = next(i for i, record in enumerate(records) if record.kind == ACKNOWLEDGED)
    flush = max(i for i in range(first) if records[i].kind == FLUSH)
    nothing_more = Cut(flush, frozenset())
    fault = judge_cut(folder, device, records, nothing_more, saves)
    assert fault is not None
    assert fault.startswith("TORN" if missing == "sync_file" else "NONE")


def test_a_device_that_is_gone_leaves_no_mount_behind(folder, device):
    with device.plugged_in(), device.mounted() as root, Training(root) as training:
        training.save(1)
        device.pull_out()
        assert refusal(training.save, 2).errno in (errno.EIO, errno.EROFS)
    assert str(folder) not in Path("/proc/self/mounts").read_text()


class Syncs:
    """Counts the calls that make something durable; the device fails from one of them on.

    Attributes:
        count: How many there were.
        files: Inodes of the files among them, from when the device fails.
    """

    def __init__(self, monkeypatch, device, fail_at):
        self.count, self.files = 0, []
        self._device, self._fail_at = device, fail_at
        for name in ("sync_file", "sync_directory"):
            monkeypatch.setattr(filesystem, name, self._noted(getattr(filesystem, name)))

    def _noted(self, sync):
        def call(target, **how):
            self.count += 1
            if self.count == self._fail_at:
                self._device.fail()
            if self._fail_at and self.count >= self._fail_at and isinstance(target, int):
                self.files.append(os.fstat(target).st_ino)
            sync(target, **how)

        return call


def syncs_of_a_save(device, way, monkeypatch):
    with (
        monkeypatch.context() as patched,
        device.plugged_in(),
        device.mounted() as root,
        Training(root, **WAYS[way]) as training,
    ):
        training.save(1)
        syncs = Syncs(patched, device, 0)
        training.save(2)
    return syncs.count


def save_on_a_disk_that_fails(device, way, monkeypatch, number):
    """Let the disk fail at a sync of the second save; return whether ext4 lived on."""
    saves = [Saved.of(1), Saved.of(2), Saved.of(3)]
    with device.plugged_in():
        with device.mounted() as root, Training(root, **WAYS[way]) as training:
            training.save(1)
            with monkeypatch.context() as patched:
                syncs = Syncs(patched, device, number)
                error = refusal(training.save, 2)
            assert len(set(syncs.files)) == len(syncs.files)  # none a second time
            device.mend()
            assert error.errno == errno.EIO, error
            # A disk that fails under the last sync leaves ext4 read-only: the generation,
            # which is whole, keeps its name until it is mounted again.
            named = isinstance(error, PublishError)
            assert training.restore() in (saves[:2] if named else saves[:1])
            lives = goes_on(training)
        with device.mounted() as root:
            assert judge(root, saves, 2 if lives else 0) is None
    return lives


def goes_on(training):
    """Save once more; return False if ext4 lost its journal and is read-only."""
    try:
        training.save(3)
    except SaveError as error:
        if error.errno != errno.EROFS:
            raise
        return False
    assert training.restore() == Saved.of(3)
    return True


@pytest.mark.parametrize("way", WAYS)
def test_an_fsync_that_fails_with_the_disk(way, device, monkeypatch):
    total = syncs_of_a_save(device, way, monkeypatch)
    assert total > 4
    lived = [
        save_on_a_disk_that_fails(device, way, monkeypatch, number)
        for number in range(1, total + 1)
    ]
    assert lived[0]  # a file has lost bytes, ext4 nothing: the next save must work
    COUNTS["disks that failed"] += total
