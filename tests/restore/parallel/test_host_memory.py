# SPDX-License-Identifier: Apache-2.0
"""Restores whose window the ranks of a host share."""

import time

import numpy as np
import pytest

from mpi_ckpt import ArrayState, ObjectState
from mpi_ckpt.engine.restore import host_memory, transfer
from mpi_ckpt.errors import ReadError
from mpi_ckpt.leaves import target as memory_of_leaf
from mpi_ckpt.memory import SharedMemory
from mpi_ckpt.options import IO
from mpi_ckpt.storage import filesystem
from tests.ranks import groupings, manager, same_error

WINDOW = 1 << 16
LEAVES = 40


@pytest.fixture(autouse=True)
def small_states_share(monkeypatch):
    monkeypatch.setattr(host_memory, "_LEAST_BYTES", 1)


@pytest.fixture
def shared(monkeypatch):
    """Counts the windows that pass through shared memory, and those that are sent."""
    counts = {"shared": 0, "sent": 0}

    def counted(kind, name):
        real = kind.store

        def store(self, turn):
            counts[name] += 1
            real(self, turn)

        monkeypatch.setattr(kind, "store", store)

    counted(transfer.SharedTransport, "shared")
    counted(transfer.SentTransport, "sent")
    real = host_memory.HostMemory.note_stored

    def note_stored(self, number):
        counts["shared"] += 1
        real(self, number)

    monkeypatch.setattr(host_memory.HostMemory, "note_stored", note_stored)
    return counts


def arrays(value):
    return {f"x{n:02d}": np.full(5000 + n, value + n) for n in range(LEAVES)}


def saved(path, comm, value=1.0, **options):
    states = [ArrayState("a", arrays(value)), ObjectState("plain", {"epoch": 3})]
    with manager(path, *states, comm=comm, **options) as mine:
        return mine.save().wait()


def restored(path, comm, value=1.0, readers="root"):
    found, plain = arrays(0.0), ObjectState("plain", {})
    io = IO(readers=readers, window_bytes=WINDOW)
    with manager(path, ArrayState("a", found), plain, comm=comm, io=io) as mine:
        report = mine.restore()
    assert plain.value == {"epoch": 3}
    assert all((found[name] == array).all() for name, array in arrays(value).items())
    return report


@pytest.mark.parametrize("readers", ["root", "node", "all"])
def test_every_way_to_lay_ranks_on_hosts(comm, shared_path, on_hosts, shared, readers):
    saved(shared_path, comm)
    for hosts in groupings(comm.size):
        on_hosts(hosts)
        shared.update(shared=0, sent=0)
        restored(shared_path, comm, readers=readers)
        several = len(set(hosts)) < comm.size
        if readers == "all":  # then not all that read are the first of a host
            several = several and comm.size == 1
        assert (shared["shared"] > 0, shared["sent"] > 0) == (several, not several), hosts


def test_windows_are_used_over_and_over(peers, shared_path, shared):
    saved(shared_path, peers)
    restored(shared_path, peers)
    assert shared["shared"] > 3 * 4


def test_no_descriptor_stays_open(peers, shared_path, monkeypatch):
    mine = []
    real = SharedMemory.__init__

    def noted(self, *arguments):
        mine.append(self)
        real(self, *arguments)

    monkeypatch.setattr(SharedMemory, "__init__", noted)
    saved(shared_path, peers)
    restored(shared_path, peers)
    assert len(mine) == (1 if peers.rank == 0 else 2)
    for memory in mine:
        with pytest.raises(AssertionError):
            _ = memory.descriptor


def no_memory(*_):
    raise OSError(38, "Function not implemented")


@pytest.mark.parametrize("lacking", ["create", "attach", "visible", "another"])
def test_without_shared_memory_on_any_rank_all_are_sent_the_bytes(
    peers, shared_path, monkeypatch, shared, lacking
):
    saved(shared_path, peers)
    last = peers.rank == peers.size - 1
    if lacking == "create":
        monkeypatch.setattr(SharedMemory, "create", no_memory)
    elif lacking == "attach" and last:
        monkeypatch.setattr(SharedMemory, "attach", no_memory)
    elif lacking == "visible" and last:
        # As in a container of its own under the same host name.
        real = host_memory.HostMemory._attach

        def blind(self, *arguments):
            self._comm.visible.clear()
            real(self, *arguments)

        monkeypatch.setattr(host_memory.HostMemory, "_attach", blind)
    elif lacking == "another" and last:
        other = SharedMemory.create(1 << 24)
        monkeypatch.setattr(SharedMemory, "attach", lambda *_: other)
    restored(shared_path, peers)
    assert shared["shared"] == 0
    assert shared["sent"] > 0


def test_a_slow_rank_is_waited_for(peers, shared_path, monkeypatch, shared):
    saved(shared_path, peers)
    monkeypatch.setattr(host_memory, "_LOOKS", 1)
    slow = memory_of_leaf.copy_bytes

    def copy(source, target):
        time.sleep(0.002 * (peers.rank == peers.size - 1))
        slow(source, target)

    monkeypatch.setattr(memory_of_leaf, "copy_bytes", copy)
    restored(shared_path, peers)
    assert shared["sent"] == 0


def test_ranks_meet_for_each_window_where_counts_may_come_early(
    peers, shared_path, monkeypatch, shared
):
    saved(shared_path, peers)
    monkeypatch.setattr(host_memory, "_IS_ORDERED", False)
    monkeypatch.setattr(host_memory.HostMemory, "_announce", lambda *_: None)
    monkeypatch.setattr(host_memory, "_LOOKS", 3)
    restored(shared_path, peers)
    assert shared["shared"] > 3 * 4
    assert shared["sent"] == 0


def test_ranks_sleep_until_a_window_is_announced(peers, shared_path, monkeypatch):
    saved(shared_path, peers)
    # An hour, if nothing is announced.
    monkeypatch.setattr(host_memory, "_LOOKS", 10_000_000)
    restored(shared_path, peers)


@pytest.mark.parametrize("at", [0, 70_000, 700_000])
def test_an_io_error_amid_a_full_queue_fails_all_ranks(peers, shared_path, monkeypatch, at):
    saved(shared_path, peers)
    real = filesystem.read_at

    def failing(descriptor, into, offset):
        if peers.rank == 0 and len(into) >= 4096 and offset >= 4096 + at:
            raise OSError(5, "Input/output error")
        return real(descriptor, into, offset)

    found = ArrayState("a", arrays(0.0))
    with manager(
        shared_path,
        found,
        ObjectState("plain", {}),
        comm=peers,
        io=IO(window_bytes=WINDOW),
    ) as mine:
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "read_at", failing)
            with same_error(peers, ReadError, "rank 0", "EIO"):
                mine.restore()
        assert mine.restore().generation == 1


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_damage_sends_all_back_and_nothing_of_it_is_stored(
    peers, shared_path, monkeypatch, place
):
    saved(shared_path, peers, 1.0)
    path = saved(shared_path, peers, 2.0, io=IO(reuse=False)).path
    if peers.rank == 0:
        (shard,) = path.glob("rank-*")
        with shard.open("r+b") as file:
            file.seek(int(shard.stat().st_size * place))
            file.write(b"\xff" * 8)
    peers.Barrier()
    stored = []
    real = memory_of_leaf.copy_bytes

    def watched(source, target):
        stored.append(b"\xff" * 8 in bytes(source))
        real(source, target)

    monkeypatch.setattr(memory_of_leaf, "copy_bytes", watched)
    report = restored(shared_path, peers, 1.0)
    assert report.generation == 1
    assert not any(stored)
