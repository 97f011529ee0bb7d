# SPDX-License-Identifier: Apache-2.0
"""Generations on hosts that are copied to the directory after the job, by all hosts."""

import logging

import pytest

from mpi_ckpt.engine.hosts.copying import directory_copy
from mpi_ckpt.engine.hosts.copying.promoting import rescue
from mpi_ckpt.errors import FencedError, LockedError, WriteError
from mpi_ckpt.storage.directory import CheckpointDirectory
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from mpi_ckpt.storage.writing.partial import Partial
from tests.local.scene import flip
from tests.ranks import assert_same, same_error

pytestmark = pytest.mark.filterwarnings("error")


def call(scene):
    scene.on_hosts(scene.hosts)
    scene.comm.Barrier()
    return rescue(f"{scene.path}/local/{{host}}", scene.directory, scene.comm)


def test_the_newest_is_copied_and_restored_without_the_hosts(scene, comm, caplog):
    scene.run(5, durable=[2])
    with caplog.at_level(logging.WARNING):
        rescued = call(scene)
    assert not [line for line in caplog.messages if "of another run" in line]
    assert_same(comm, (rescued.generation, rescued.step, rescued.path, rescued.nbytes))
    assert (rescued.generation, rescued.step) == (2, 5)
    scene.wipe(*scene.hosts)
    restored, _ = scene.run(5, hosts=[f"new{rank}" for rank in range(comm.size)])
    assert (restored.level, restored.step, restored.generation) == ("directory", 5, 2)
    assert not [line for line in caplog.messages if "lost" in line]


def test_nothing_is_copied_that_the_directory_has(scene, comm):
    assert call(scene).generation == 0
    scene.run(3, durable=[3])
    assert call(scene).generation == 0
    scene.run(4)
    assert call(scene).step == 4
    assert call(scene).generation == 0


def test_what_is_copied_is_an_ordinary_generation(scene, comm):
    scene.run(2)
    rescued = call(scene)
    if comm.rank == 0:
        with GenerationReader(scene.directory / "checkpoint-00000001") as reader:
            assert reader.manifest.local is None
            assert {file.generation for file in reader.manifest.files} == {1}
            verify(reader)
    assert rescued.generation == 1
    assert not list(scene.directory.glob(".partial*"))
    # The next save of a job takes the next number.
    _, saves = scene.run(3, durable=[3])
    assert saves[3].generation == 2


def test_hosts_that_are_left_have_enough_for_a_rescue(scene, comm):
    if comm.size == 1:
        pytest.skip("one host has no other")
    for step, lost in enumerate(scene.hosts, 1):
        scene.run(2 * step)
        scene.wipe(lost)
        assert call(scene).step == 2 * step


def test_a_bad_copy_is_replaced_by_another_and_a_lost_one_by_none(scene, comm):
    if comm.size == 1:
        pytest.skip("one host has no other copy")
    scene.run(2)

    def damage():
        name = max(scene.files("h0", 2))
        flip(scene.home("h0") / "checkpoint-00000002" / name, -1)

    scene.on_root(damage)
    scene.wipe("nobody")
    rescued = call(scene)
    assert rescued.step == 2
    restored, _ = scene.run(2)
    assert restored.step == 2


@pytest.mark.parametrize("fault", ["write_shard", "publish"])
def test_a_fault_on_a_host_copies_nothing(scene, comm, monkeypatch, fault):
    scene.run(2)

    def fail(*_, **__):
        raise WriteError("no more", path=scene.path)

    with monkeypatch.context() as patch:
        if comm.rank == (comm.size - 1 if fault == "write_shard" else 0):
            patch.setattr(Partial, fault, fail)
        with same_error(comm, WriteError, "no more"):
            call(scene)
    assert not list(scene.directory.glob("checkpoint-*"))
    assert not list(scene.directory.glob(".partial*"))
    assert call(scene).step == 2


def test_a_directory_in_use_is_refused(scene, comm):
    scene.run(2)
    job = CheckpointDirectory(scene.directory)
    if comm.rank == 0:
        job.own()
    comm.Barrier()
    with same_error(comm, LockedError, "belongs to another running job"):
        call(scene)
    comm.Barrier()
    job.close()


def test_a_job_that_takes_the_directory_over_fences_the_copy_off(scene, comm, monkeypatch):
    scene.run(2)
    real = directory_copy.encode

    def taken_over(manifest):
        lock = scene.directory / ".lock"
        lock.write_text("job abcdef, process 1 on elsewhere\n")
        return real(manifest)

    monkeypatch.setattr(directory_copy, "encode", taken_over)
    with same_error(comm, FencedError, "taken over"):
        call(scene)
    assert not list(scene.directory.glob("checkpoint-*"))
