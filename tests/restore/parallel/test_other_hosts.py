# SPDX-License-Identifier: Apache-2.0
"""A directory of each host's own: a job that finds nothing hears of what others have."""

import logging

import numpy as np
import pytest

from mpi_ckpt import ArrayState
from mpi_ckpt.engine.restore import newest as elsewhere
from mpi_ckpt.errors import ReadError
from mpi_ckpt.storage.directory import catalog
from mpi_ckpt.storage.directory.recovery import Survey
from mpi_ckpt.storage.owning import ownership
from tests.ranks import assert_same, manager, same_error

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def array():
    return ArrayState("array", {"x": np.zeros(3)})


@pytest.fixture
def apart(comm, on_hosts, shared_path):
    """Give each rank a host, and a directory, of its own."""
    on_hosts([f"h{rank}" for rank in range(comm.size)])
    return shared_path / f"h{comm.rank}"


def test_generations_of_another_host_are_no_fresh_start(comm, apart, shared_path, array):
    last = comm.size - 1
    if last == 0:
        pytest.skip("one rank has no other host")
    # An earlier job of one host had its root there.
    alone = comm.Split(comm.rank == last)
    with manager(shared_path / f"h{last}", array, comm=alone) as earlier:
        if comm.rank == last:
            earlier.save()
            earlier.save()
    alone.Free()
    with manager(apart, array) as checkpoints:
        with same_error(comm, ReadError, "root, on h0", f"2 on h{last}, the newest 2"):
            checkpoints.restore()
        checkpoints.save()  # who wants to begin anew may, and finds it again
        assert checkpoints.restore().generation == 1


def test_a_directory_that_root_alone_sees_is_told_of(comm, apart, array, caplog):
    with manager(apart, array) as checkpoints, caplog.at_level(logging.WARNING):
        assert checkpoints.restore() is None
    told = [
        message
        for message in caplog.messages
        if "no other" in message or "do not see it" in message
    ]
    assert len(told) == (comm.rank == 0 and comm.size > 1)
    for line in told:
        assert f"{comm.size - 1} other hosts do not see it, h1 first" in line
        assert "h0 alone" in line


def test_a_directory_that_all_see_is_no_matter(comm, on_hosts, shared_path, array, caplog):
    on_hosts([f"h{rank}" for rank in range(comm.size)])
    with manager(shared_path, array) as checkpoints, caplog.at_level(logging.WARNING):
        assert checkpoints.restore() is None
        checkpoints.save()
        assert checkpoints.restore().generation == 1
    assert_same(comm, caplog.messages)
    assert caplog.messages == []


def test_a_listing_of_old_on_roots_host_is_no_fresh_start(
    comm, on_hosts, shared_path, array, monkeypatch
):
    on_hosts([f"h{rank}" for rank in range(comm.size)])
    if comm.size == 1:
        pytest.skip("one rank has no other host")
    with manager(shared_path, array) as checkpoints:
        checkpoints.save()
    if comm.rank == 0:
        for name in ("survey", "settled_survey"):
            monkeypatch.setattr(catalog, name, lambda _: Survey())
    with (
        manager(shared_path, array) as checkpoints,
        same_error(comm, ReadError, "root sees an old state of it"),
    ):
        checkpoints.restore()


@pytest.mark.parametrize("kind", ["ext4", None])
def test_a_batch_job_on_a_local_disk_is_told_of_it(
    comm, shared_path, array, caplog, monkeypatch, kind
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(elsewhere, "local_file_system", lambda _: kind)
    with manager(shared_path, array) as checkpoints, caplog.at_level(logging.WARNING):
        assert checkpoints.restore() is None
        checkpoints.save()
        checkpoints.restore()
    told = [line for line in caplog.messages if "ext4, which no other host sees" in line]
    assert len(told) == (kind is not None and comm.rank == 0)


def test_the_file_system_of_a_path_is_the_last_mounted_above_it(tmp_path, monkeypatch):
    table = tmp_path / "mountinfo"
    lines = [
        "1 0 8:1 / / rw shared:1 - ext4 /dev/a rw",
        "2 1 0:5 / /scratch rw - lustre srv:/x rw",
        "3 1 0:6 / /two\\040words rw - tmpfs t rw",
        "4 2 0:7 / /scratch/fast rw - xfs /dev/b rw",
        "5 4 0:8 / /scratch/fast rw - nfs4 srv:/y rw",
    ]
    table.write_text("\n".join(lines))
    monkeypatch.setattr(ownership, "_MOUNTED", table)
    found = {
        place: ownership.local_file_system(ownership.Path(place))
        for place in ("/", "/scratch/a/b", "/two words/x", "/scratch/fast", "/new/place")
    }
    assert found == {
        "/": "ext4",
        "/scratch/a/b": None,
        "/two words/x": "tmpfs",
        "/scratch/fast": None,
        "/new/place": "ext4",
    }
