# SPDX-License-Identifier: Apache-2.0
"""Restores that several ranks read."""

import numpy as np
import pytest

from mpi_ckpt import ArrayState, ObjectState
from mpi_ckpt.errors import ReadError
from mpi_ckpt.options import IO
from mpi_ckpt.storage import filesystem
from tests.ranks import assert_same, groupings, manager, same_error

WINDOW = 1 << 16


def arrays(value):
    return {f"x{n:02d}": np.full(5000 + n, value + n) for n in range(40)}


def saved(path, comm, value=1.0, **options):
    states = [ArrayState("a", arrays(value)), ObjectState("plain", {"epoch": 3})]
    with manager(path, *states, comm=comm, **options) as mine:
        return mine.save().wait()


def read_by(path, comm, readers, value=1.0):
    found, plain = arrays(0.0), ObjectState("plain", {})
    with manager(
        path,
        ArrayState("a", found),
        plain,
        comm=comm,
        io=IO(readers=readers, window_bytes=WINDOW),
    ) as mine:
        report = mine.restore()
    assert plain.value == {"epoch": 3}
    assert all((found[name] == array).all() for name, array in arrays(value).items())
    return report


@pytest.mark.parametrize("writers", ["root", "all"])
@pytest.mark.parametrize("readers", ["root", "node", "all"])
def test_every_rank_gets_all(comm, shared_path, readers, writers):
    saved(shared_path, comm, writers=writers)
    assert_same(comm, read_by(shared_path, comm, readers).bytes_read)


def test_every_way_to_lay_ranks_on_hosts(comm, shared_path, on_hosts):
    saved(shared_path, comm)
    for hosts in groupings(comm.size):
        on_hosts(hosts)
        for readers in ("node", "all"):
            read_by(shared_path, comm, readers)


def test_the_files_are_read_once_by_all_together(comm, shared_path, monkeypatch):
    written = saved(shared_path, comm).bytes_written
    mine, real = [], filesystem.read_at

    def counted(descriptor, into, offset):
        count = real(descriptor, into, offset)
        mine.append(count)
        return count

    monkeypatch.setattr(filesystem, "read_at", counted)
    report = read_by(shared_path, comm, "all")
    everyone = comm.allgather(sum(mine))
    # Manifest and headers are read by each, and blocks are rounded to whole pages.
    overhead = 8 * (32 << 10) * comm.size
    assert sum(everyone) <= written + overhead
    assert report.bytes_read <= written + overhead
    if comm.size > 1:
        assert max(everyone) < written


@pytest.mark.parametrize("reader", [0, 1])
def test_damage_that_one_reader_finds_sends_all_back(comm, shared_path, reader):
    saved(shared_path, comm, 1.0)
    path = saved(shared_path, comm, 2.0, io=IO(reuse=False)).path
    if comm.rank == 0:
        (shard,) = path.glob("rank-*")
        with shard.open("r+b") as file:
            # In the share of the first or of the second reader.
            file.seek(8192 + reader * WINDOW // 2)
            file.write(b"damage")
    comm.Barrier()
    report = read_by(shared_path, comm, "all", value=1.0)
    assert report.generation == 1
    assert len(report.quarantined) == 1


def test_directory_that_a_reader_does_not_see_is_named(peers, tmp_path, shared_path):
    saved(shared_path, peers)
    root = shared_path if peers.rank == 0 else tmp_path / "elsewhere"
    with (
        manager(
            root,
            ArrayState("a", arrays(0.0)),
            ObjectState("plain", {}),
            comm=peers,
            io=IO(readers="all"),
        ) as mine,
        same_error(peers, ReadError, "rank 1", "readers='root'"),
    ):
        mine.restore()
    # The generation is good, and stays.
    read_by(shared_path, peers, "root")


def test_reader_that_fails_fails_all(peers, shared_path, monkeypatch):
    saved(shared_path, peers)
    last, real = peers.size - 1, filesystem.read_at
    calls = []

    def failing(descriptor, into, offset):
        calls.append(offset)
        if peers.rank == last and len(calls) > 4:
            raise OSError(5, "Input/output error")
        return real(descriptor, into, offset)

    with manager(
        shared_path,
        ArrayState("a", arrays(0.0)),
        ObjectState("plain", {}),
        comm=peers,
        io=IO(readers="all", window_bytes=WINDOW),
    ) as mine:
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "read_at", failing)
            with same_error(peers, ReadError, f"rank {last}"):
                mine.restore()
        assert mine.restore().generation == 1
