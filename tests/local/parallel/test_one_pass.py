# SPDX-License-Identifier: Apache-2.0
"""Local saves that compare replicas, copy and write in one pass; files that are mapped."""

import numpy as np
import pytest

from mpi_ckpt import ArrayState
from mpi_ckpt.engine.hosts import share_writer
from mpi_ckpt.engine.sync import replicas
from mpi_ckpt.errors import DivergedError, WriteError
from mpi_ckpt.storage.local import host_directory
from mpi_ckpt.storage.writing.partial import Partial
from tests.local.scene import Crash, Scene, Values
from tests.ranks import same_error

pytestmark = pytest.mark.filterwarnings("error")


class Alike(Values):
    """States of which all but the parts of ranks are the same everywhere."""

    def go_to(self, step):
        super().go_to(step)
        self.same[:] = step


@pytest.fixture
def waiting(monkeypatch):
    """Replicas of any size are compared beside the work."""
    monkeypatch.setattr(replicas, "WAITING_BYTES_MIN", 0)


@pytest.fixture
def in_memory(monkeypatch):
    """Hosts take their directories to lie in memory, and files of any size to be large."""
    monkeypatch.setattr(host_directory, "IN_MEMORY", _Everything())
    monkeypatch.setattr(host_directory, "MAPPED_BYTES_MIN", 0)


class _Everything:
    def __contains__(self, _):
        return True


@pytest.fixture
def digested(monkeypatch):
    """Return how often a sync has digested replicas before any other work."""
    counted = []
    original = replicas.digest_rest

    def digest(captured, threads):
        counted.append(len(captured))
        return original(captured, threads)

    monkeypatch.setattr(replicas, "digest_rest", digest)
    return counted


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.usefixtures("waiting")
def test_equal_replicas_are_not_digested_before_they_are_copied(
    comm, on_hosts, shared_path, digested, asynchronous
):
    scene = Scene(comm, on_hosts, shared_path, Alike)
    _, saves = scene.run(3, asynchronous=asynchronous)
    assert all(saves[step].generation == step for step in saves)
    assert not any(digested)
    restored, _ = scene.run(3)
    assert (restored.level, restored.step) == ("local", 3)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.usefixtures("waiting")
def test_replicas_that_differ_are_made_equal_on_all_hosts(scene, comm, asynchronous):
    _, saves = scene.run(3, asynchronous=asynchronous)
    for report in saves.values():
        assert report.generation
        assert set(report.sync.differing) == ({"roots"} if comm.size > 1 else set())
    if comm.size > 1:
        scene.wipe(scene.hosts[0])  # what is left was written beside root
    restored, _ = scene.run(3)
    assert (restored.level, restored.step) == ("local", 3)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.usefixtures("waiting")
def test_replicas_that_diverge_leave_nothing(scene, comm, asynchronous):
    if comm.size == 1:
        pytest.skip("nothing to compare with")
    scene.on_hosts(scene.hosts)
    values = Alike(comm)
    with scene.manager(values, asynchronous=asynchronous) as manager:
        values.go_to(1)
        values.arrays["x3"][7] = comm.rank
        with same_error(comm, DivergedError, "x3"):
            manager.save(1, level="local")
        comm.Barrier()
        assert not list(scene.path.glob("local/*/*/.partial-*"))
        values.go_to(2)
        assert manager.save(2, level="local").wait().generation


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_host_that_writes_other_bytes_fails_the_save(
    scene, comm, monkeypatch, asynchronous
):
    if comm.size == 1:
        pytest.skip("nothing to compare with")
    scene.on_hosts(scene.hosts)
    values = Alike(comm)
    original = share_writer.encode

    def other(manifest):
        return original(manifest) + b" " * (comm.rank == comm.size - 1)

    with scene.manager(values, asynchronous=asynchronous) as manager:
        values.go_to(1)
        with monkeypatch.context() as patch:
            patch.setattr(share_writer, "encode", other)
            report = manager.save(1, level="local").wait()
        assert (report.generation, report.local_failures) == (0, 1)
        values.go_to(2)
        assert manager.save(2, level="local").wait().generation


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.usefixtures("in_memory")
def test_files_in_memory_are_used_again(scene, comm, asynchronous):
    scene.on_hosts(scene.hosts)
    values, inodes = Alike(comm), {}
    host = scene.hosts[comm.rank]

    def train():
        with scene.manager(
            values, local=scene.local(keep=1), asynchronous=asynchronous
        ) as manager:
            for step in range(1, 6):
                values.go_to(step)
                assert manager.save(step, level="local").wait().generation == step
                manager.wait()
                folder = scene.home(host) / f"checkpoint-{step:08d}"
                inodes[step] = {path.stat().st_ino for path in folder.glob("share-*")}
            assert list(scene.home(host).glob(".spare-*"))
            raise Crash

    with pytest.raises(Crash):
        train()
    scene.saved_by[5] = comm.size
    # The files of two generations, the last one and the next, serve all saves.
    assert len(set().union(*inodes.values())) <= 3 * len(inodes[1])
    assert not list(scene.home(host).glob(".spare-*"))
    comm.Barrier()
    restored, _ = scene.run(5)
    assert (restored.level, restored.step) == ("local", 5)


@pytest.mark.usefixtures("in_memory")
def test_a_generation_never_changes_while_it_is_kept(scene, comm):
    scene.on_hosts(scene.hosts)
    values, host = Alike(comm), scene.hosts[comm.rank]
    with scene.manager(values, local=scene.local(keep=2)) as manager:
        for step in range(1, 5):
            values.go_to(step)
            manager.save(step, level="local")
            manager.wait()
            before = scene.home(host) / f"checkpoint-{max(step - 1, 1):08d}"
            kept = {p.name: p.read_bytes() for p in before.glob("share-*")}
            values.go_to(step + 100)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Partial, "seal", _fail)
                assert not manager.save(step + 100, level="local").generation
            assert kept == {p.name: p.read_bytes() for p in before.glob("share-*")}


def _fail(*_):
    raise WriteError("no more", errno=28)


@pytest.mark.usefixtures("in_memory")
def test_what_a_killed_job_has_left_mapped_is_removed(scene, comm):
    scene.run(1)
    left = scene.home(scene.hosts[comm.rank]) / ".spare-7"
    left.write_bytes(b"left")
    scene.run(2)
    assert not left.exists()


@pytest.mark.usefixtures("in_memory")
def test_a_leaf_of_another_length_gets_another_file(scene, comm):
    scene.on_hosts(scene.hosts)
    host = scene.hosts[comm.rank]
    for length in (1000, 5000, 10):
        state = ArrayState("arrays", {"x": np.full(length, 3.0)}, sync="check")
        values = Alike(comm)
        values.states = [state]
        with scene.manager(values, local=scene.local(keep=1)) as manager:
            assert manager.save(length, level="local").generation
            assert manager.save(length + 1, level="local").generation
    assert not list(scene.home(host).glob(".spare-*"))
