# SPDX-License-Identifier: Apache-2.0
"""Saves that several ranks write."""

import errno
import os
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from mpi_ckpt import ArrayState, ObjectState, PerRankState
from mpi_ckpt.errors import SaveError, WriteError
from mpi_ckpt.storage import filesystem
from tests.ranks import assert_same, manager, same_error

LEAVES = 24


def arrays(value=1.0):
    return {f"x{n:02d}": np.full(1000 * (n + 1), value + n) for n in range(LEAVES)}


def shards(path):
    return sorted(path.glob("rank-*.safetensors"))


def assert_restored(path, value, comm=None):
    found = arrays(0.0)
    with manager(path, ArrayState("a", found), comm=comm) as other:
        other.restore()
    for name, array in arrays(value).items():
        assert (found[name] == array).all(), name


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_rank_writes_its_share(comm, shared_path, asynchronous):
    state = ArrayState("a", arrays())
    with manager(
        shared_path, state, comm=comm, writers="all", asynchronous=asynchronous
    ) as mine:
        report = mine.save(step=5).wait()
        assert_same(comm, report.bytes_written)
        assert len(shards(report.path)) == comm.size
        files = [file.stat().st_size for file in report.path.iterdir()]
        assert sum(files) == report.bytes_written
        data = [file.stat().st_size for file in shards(report.path)]
        # No share is heavier than the lightest by more than one leaf.
        assert max(data) - min(data) <= 8 * 1000 * LEAVES + 8192
        names = [name for file in shards(report.path) for name in load_file(file)]
        assert sorted(names) == [f"a/{name}" for name in arrays()]
    assert_restored(shared_path, 1.0, comm)


def test_any_number_of_ranks_restores_it(comm, shared_path):
    with manager(
        shared_path, ArrayState("a", arrays(3.0)), comm=comm, writers="all"
    ) as mine:
        mine.save()
    for size in range(1, comm.size + 1):
        few = comm.Split(0 if comm.rank < size else 1)
        if comm.rank < size:
            assert_restored(shared_path, 3.0, few)
        few.Free()
        comm.Barrier()


def test_one_rank_of_each_host_writes(comm, shared_path, on_hosts):
    on_hosts("abab")
    with manager(shared_path, ArrayState("a", arrays()), comm=comm, writers="node") as mine:
        report = mine.save()
        hosts = min(2, comm.size)
        assert [file.name for file in shards(report.path)] == [
            f"rank-{rank:05d}.safetensors" for rank in range(hosts)
        ]
    assert_restored(shared_path, 1.0, comm)


def test_what_is_not_equal_everywhere_is_roots_to_write(comm, shared_path):
    own = PerRankState("own", np.full(10, float(comm.rank)))
    late = ArrayState("late", {"x": np.full(10, float(comm.rank))}, sync="root")
    plain = ObjectState("plain", {"epoch": 3})
    with manager(
        shared_path, ArrayState("a", arrays()), own, late, plain, comm=comm, writers="all"
    ) as mine:
        report = mine.save()
        first = load_file(shards(report.path)[0])
        if comm.size == 1:
            assert (first["own/rank-00000"] == 0).all()
        else:  # each rank writes its own
            here = load_file(report.path / f"tiles-{comm.rank:05d}.safetensors")
            assert (here[f"own/rank-{comm.rank:05d}@0"] == float(comm.rank)).all()
        assert (first["late/x"] == 0).all()
        assert len(shards(report.path)) == comm.size
        unsynced = mine.save(sync=False)
        assert len(shards(unsynced.path)) <= 1 + comm.size
    found = np.full(10, -1.0)
    with manager(shared_path, ArrayState("late", {"x": found}), comm=comm) as other:
        other.restore(only=["late"])
    assert (found == 0).all()


def test_unchanged_leaves_are_shared_whoever_wrote_them(comm, shared_path):
    live = arrays()
    with manager(shared_path, ArrayState("a", live), comm=comm, writers="all") as mine:
        first = mine.save()
        live["x00"][:] = 7.0
        second = mine.save()
        assert second.bytes_written < first.bytes_written / 3
        assert second.bytes_reused > 0
        third = mine.save()
        assert third.bytes_reused == sum(array.nbytes for array in live.values())
    with manager(shared_path, ArrayState("a", arrays(0.0)), comm=comm) as other:
        other.restore()
        (state,) = other._registry.choose("looking", None)
        assert all((state.arrays[name] == live[name]).all() for name in live)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_failure_of_one_writer_is_everyones(
    comm, shared_path, monkeypatch, asynchronous, failing
):
    live = arrays()
    failing = min(failing, comm.size - 1)
    with manager(
        shared_path,
        ArrayState("a", live),
        comm=comm,
        writers="all",
        asynchronous=asynchronous,
    ) as mine:
        mine.save().wait()
        for array in live.values():
            array += 1
        with monkeypatch.context() as patch:
            if comm.rank == failing:

                def full(descriptor):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

                patch.setattr(filesystem, "sync_file", full)
            with same_error(comm, WriteError, "No space left", f"rank {failing}"):
                mine.save().wait()
        comm.Barrier()
        assert [info.generation for info in mine.generations()] == [1]
        assert not list(shared_path.glob(".partial-*"))
        assert mine.save().wait().generation == 2
    assert_restored(shared_path, 2.0, comm)


def test_directory_that_a_writer_does_not_see_is_named(comm, tmp_path, shared_path):
    if comm.size == 1:
        pytest.skip("needs a second rank")
    elsewhere = tmp_path / "elsewhere"
    root = shared_path if comm.rank == 0 else elsewhere
    with manager(root, ArrayState("a", arrays()), comm=comm, writers="all") as mine:
        with same_error(comm, WriteError, "rank 1", "writers='root'"):
            mine.save()
        assert mine.generations() == []


def test_nothing_is_published_before_the_last_writer_is_done(
    comm, shared_path, monkeypatch
):
    gate = threading.Event()
    real = filesystem.sync_file

    def held(descriptor):
        gate.wait(30)
        real(descriptor)

    if comm.rank == comm.size - 1:
        monkeypatch.setattr(filesystem, "sync_file", held)
    live = arrays()
    with manager(
        shared_path, ArrayState("a", live), comm=comm, writers="all", asynchronous=True
    ) as mine:
        pending = mine.save()
        for array in live.values():
            array += 9
        for _ in range(20):
            mine.step()
            time.sleep(0.005)
        assert not pending.finished
        assert not pending.done()
        assert not list(shared_path.glob("checkpoint-*"))
        gate.set()
        deadline = time.monotonic() + 20
        while not pending.finished and time.monotonic() < deadline:
            mine.step()
        assert pending.report.generation == 1
    assert_restored(shared_path, 1.0, comm)


def test_error_while_staging_leaves_nothing(comm, shared_path, monkeypatch):
    live = arrays()
    with manager(
        shared_path, ArrayState("a", live), comm=comm, writers="all", asynchronous=True
    ) as mine:

        def refuse(_nbytes):
            raise MemoryError("no arena")

        if comm.rank == comm.size - 1:
            monkeypatch.setattr(mine._saver.workshop.arena, "take", refuse)
        with same_error(comm, SaveError, "no arena"):
            mine.save()
        monkeypatch.undo()
        assert not list(shared_path.glob(".partial-*"))
        assert mine.save().wait().generation == 1
    assert_restored(shared_path, 1.0, comm)
