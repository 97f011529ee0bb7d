# SPDX-License-Identifier: Apache-2.0
"""Unchanged leaves are shared with the newest generation."""

import os
import shutil

import numpy as np
import pytest

from mpi_ckpt import ArrayState, CheckpointManager, KeepLast, Options
from mpi_ckpt.options import IO
from mpi_ckpt.storage import filesystem

KB = 1024


@pytest.fixture
def arrays():
    return {key: np.full(64 * KB, i, np.uint8) for i, key in enumerate("abcd")}


def manager_of(comm, path, arrays, **options):
    given = Options(preemption_signals=(), **options)
    return CheckpointManager(path, [ArrayState("arrays", arrays)], comm=comm, options=given)


def inodes(report):
    return {file.stat().st_ino for file in report.path.glob("*.safetensors")}


def check(comm, path, arrays):
    """A new manager finds what the last save had, and every byte proves."""
    expected = {key: array.copy() for key, array in arrays.items()}
    for array in arrays.values():
        array[:] = 255
    with manager_of(comm, path, arrays) as manager:
        manager.restore(only=["arrays"])  # verifies all of it first
    assert all((arrays[key] == expected[key]).all() for key in arrays)


def test_a_save_without_changes_writes_only_the_manifest(comm, shared_path, arrays):
    with manager_of(comm, shared_path, arrays) as manager:
        first, second = manager.save(), manager.save()
    assert inodes(first) == inodes(second)
    assert second.bytes_reused == 4 * 64 * KB
    assert second.bytes_written < 4 * KB
    check(comm, shared_path, arrays)


def test_only_what_changed_is_written(comm, shared_path, arrays):
    with manager_of(comm, shared_path, arrays) as manager:
        manager.save()
        arrays["b"][7] += 1
        report = manager.save()
        assert report.bytes_reused == 3 * 64 * KB
        assert 64 * KB < report.bytes_written < 80 * KB
        arrays["c"][9] += 1
        assert manager.save().bytes_reused == 3 * 64 * KB
    check(comm, shared_path, arrays)


def test_a_new_manager_reuses_what_an_old_one_wrote(comm, shared_path, arrays):
    with manager_of(comm, shared_path, arrays) as manager:
        manager.save()
    with manager_of(comm, shared_path, arrays) as manager:
        assert manager.save().bytes_reused == 4 * 64 * KB


def test_a_file_of_which_little_is_left_is_rewritten(comm, shared_path, arrays):
    with manager_of(comm, shared_path, arrays) as manager:
        manager.save()
        for key in "abc":
            arrays[key][0] += 1
        assert manager.save().bytes_reused == 0
    check(comm, shared_path, arrays)


def test_everything_is_written_anew_every_so_often(comm, shared_path, arrays):
    with manager_of(
        comm, shared_path, arrays, io=IO(full_every=3), retention=KeepLast(10)
    ) as manager:
        reused = [manager.save().bytes_reused > 0 for _ in range(7)]
    assert reused == [False, True, True, False, True, True, False]


def test_it_can_be_switched_off(comm, shared_path, arrays):
    with manager_of(comm, shared_path, arrays, io=IO(reuse=False)) as manager:
        assert not inodes(manager.save()) & inodes(manager.save())


def test_where_links_are_refused_all_is_written(comm, shared_path, arrays, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, os.strerror(1), str(source))

    with manager_of(comm, shared_path, arrays) as manager:
        manager.save()
        monkeypatch.setattr(filesystem, "link_file", refuse)
        assert manager.save().bytes_reused == 0
    check(comm, shared_path, arrays)


def test_any_generation_can_go(comm, shared_path, arrays):
    with manager_of(comm, shared_path, arrays, retention=KeepLast(9)) as manager:
        reports = []
        for turn in range(5):
            arrays["a"][0] = turn
            reports.append(manager.save())
    for report in (reports[0], reports[2], reports[3], reports[1]):
        if comm.rank == 0:
            filesystem.remove_tree(report.path)
        check(comm, shared_path, arrays)


def test_a_copied_generation_is_complete(comm, shared_path, arrays):
    with manager_of(comm, shared_path / "here", arrays) as manager:
        manager.save()
        arrays["a"][0] += 1
        report = manager.save()
    if comm.rank == 0:
        shutil.copytree(report.path, shared_path / "there" / report.path.name)
    check(comm, shared_path / "there", arrays)


def test_asynchronous_saves_reuse_too(comm, shared_path, arrays):
    with manager_of(comm, shared_path, arrays, asynchronous=True) as manager:
        manager.save()
        report = manager.save().wait()
    assert report.bytes_reused == 4 * 64 * KB
    check(comm, shared_path, arrays)
