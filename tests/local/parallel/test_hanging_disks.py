# SPDX-License-Identifier: Apache-2.0
"""A disk of one host that hangs behind the training: warned of there, an error on all."""

import logging
import time

import pytest

from mpi_ckpt.engine import session
from mpi_ckpt.engine.hosts import share_writer
from mpi_ckpt.errors import CollectiveError
from tests.local.scene import Crash, Values


@pytest.fixture
def hang(monkeypatch, comm):
    """Let the disk of the last host take so many seconds from now on."""

    def hang(seconds):
        write = share_writer.write_shard

        def slow(*args, **options):
            time.sleep(seconds)
            return write(*args, **options)

        if comm.rank == comm.size - 1:
            monkeypatch.setattr(share_writer, "write_shard", slow)

    return hang


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_local_save_without_progress_is_warned_of(
    scene, comm, hang, caplog, monkeypatch, asynchronous
):
    monkeypatch.setattr(session, "_QUIET_SHARE", 0.01)
    scene.on_hosts(scene.hosts)
    values = Values(comm)
    with scene.manager(values, asynchronous=asynchronous) as manager:
        values.go_to(1)
        assert manager.save(1, level="local").wait().generation == 1
        caplog.clear()
        hang(1.0)
        values.go_to(2)
        with caplog.at_level(logging.WARNING):
            assert manager.save(2, level="local").wait().generation == 2
    told = [line for line in caplog.messages if "saving to hosts: no progress" in line]
    assert bool(told) == (comm.rank == comm.size - 1)
    assert all("phase write" in line for line in told)


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", [False, True])
def test_ranks_wait_for_a_hanging_disk_no_longer_than_their_deadline(
    scene, comm, hang, asynchronous
):
    if comm.size == 1:
        pytest.skip("one host waits for no other")
    scene.run(1)
    scene.on_hosts(scene.hosts)
    values, hung = Values(comm), comm.size - 1

    def train():
        with scene.manager(values, asynchronous=asynchronous) as manager:
            values.check(manager.restore().step, comm.size)
            hang(3.0)
            manager._session.comm.deadline_seconds = 1.0
            values.go_to(2)
            try:
                manager.save(2, level="local").wait()
            except CollectiveError as error:
                told = str(error)
            raise Crash(told)

    with pytest.raises(Crash) as ended:
        train()
    if comm.rank != hung:
        assert f"rank {hung} on h{hung}" in str(ended.value)
        assert "within 1 s" in str(ended.value)
    comm.Barrier()
    restored, _ = scene.run(1)
    assert (restored.level, restored.step) == ("local", 1)
