# SPDX-License-Identifier: Apache-2.0
"""Local saves that fail on one host: reported on all ranks, and the training goes on."""

import logging
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from mpi_ckpt import ArrayState, CheckpointManager, Options, State
from mpi_ckpt.engine.hosts import share_writer
from mpi_ckpt.errors import DivergedError, OptionsError, StageError, WriteError
from mpi_ckpt.memory import Memory
from mpi_ckpt.storage.journal import read_history, read_status
from mpi_ckpt.storage.local import host_directory
from mpi_ckpt.storage.writing.partial import Partial
from tests.local.scene import Crash, Values
from tests.ranks import assert_same, same_error

pytestmark = pytest.mark.filterwarnings("error")


def fail(*_, **__):
    raise WriteError("no more", path=Path("/x"), errno=28)


FAULTS = {
    "begin": (host_directory.HostDirectory, "begin"),
    "stage": (share_writer, "stage_files"),
    "share": (share_writer, "write_shard"),
    "manifest": (Partial, "seal"),
    "rename": (Partial, "appear"),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_host_fails_the_save_on_all(
    scene, comm, monkeypatch, caplog, fault, asynchronous
):
    if fault == "stage" and not asynchronous:
        pytest.skip("nothing is copied")
    scene.on_hosts(scene.hosts)
    values = Values(comm)

    def train():
        with scene.manager(values, asynchronous=asynchronous) as manager:
            values.go_to(1)
            assert manager.save(1, level="local").wait().generation == 1
            values.go_to(2)
            with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
                if comm.rank == comm.size - 1:
                    patch.setattr(*FAULTS[fault], fail)
                report = manager.save(2, level="local").wait()
            assert_same(comm, (report.generation, report.local_failures, report.survives))
            assert (report.generation, report.local_failures) == (0, 1)
            assert not report.survives
            told = [line for line in caplog.messages if "step 2 has failed" in line]
            assert len(told) == (comm.rank == 0)
            assert read_status(scene.directory)["local_failures"] == 1
            comm.Barrier()
            values.go_to(3)
            report = manager.save(3, level="local").wait()
            assert (report.generation, report.local_failures) == (3, 0)
            raise Crash

    with pytest.raises(Crash):
        train()
    comm.Barrier()
    assert not list(scene.path.glob("local/*/*/.partial-*"))
    assert not list(scene.path.glob("local/*/*/checkpoint-00000002"))
    failed = [one for one in read_history(scene.directory) if one.event == "failed"]
    assert [(one.step, one.reason) for one in failed] in (
        [(2, "WriteError")], [(2, "StageError")],
    )  # fmt: skip
    assert read_status(scene.directory)["local_failures"] == 0
    scene.saved_by[3] = comm.size
    restored, _ = scene.run(3)
    assert (restored.level, restored.step) == ("local", 3)


def test_three_failures_in_a_row_switch_it_off(scene, comm, monkeypatch, caplog):
    scene.on_hosts(scene.hosts)
    values = Values(comm)
    with (
        scene.manager(values, local=scene.local(every=1), interval=6) as manager,
        caplog.at_level(logging.WARNING),
    ):
        if comm.rank == comm.size - 1:
            monkeypatch.setattr(host_directory.HostDirectory, "begin", fail)
        for step in range(1, 7):
            values.go_to(step)
            manager.step()
        report = manager.save(7, level="local").wait()
        assert (report.generation, report.local_failures) == (0, 3)
    told = [line for line in caplog.messages if "local save" in line]
    assert len(told) == (3 if comm.rank == 0 else 0)
    assert sum("switched off" in line for line in told) == (comm.rank == 0)
    assert [path.name for path in scene.directory.glob("checkpoint-*")] == [
        "checkpoint-00000001"
    ]


def test_a_reserve_that_cannot_stay_free_fails_the_save(scene, comm, caplog):
    scene.on_hosts(scene.hosts)
    values = Values(comm)
    local = scene.local(reserve=1 << 60)
    with scene.manager(values, local=local) as manager, caplog.at_level(logging.WARNING):
        assert manager.save(1, level="local").wait().generation == 0
    assert sum("to stay free" in line for line in caplog.messages) == (comm.rank == 0)


def test_a_host_without_its_directory_fails_saves_and_not_restores(scene, comm, caplog):
    scene.run(2)
    if comm.size == 1:
        pytest.skip("one host has no other")
    last = scene.hosts[-1]

    def block():
        scene.home(last).rename(scene.path / "gone")
        (scene.path / "local" / last).rmdir()
        (scene.path / "local" / last).write_text("no directory")

    scene.on_root(block)
    with caplog.at_level(logging.WARNING):
        restored, saves = scene.run(3)
    assert (restored.level, restored.step) == ("local", 2)
    assert saves[3].generation == 0
    assert any(last in line for line in caplog.messages) == (comm.rank == 0)


def test_what_any_save_refuses_is_an_error(scene, comm):
    scene.on_hosts(scene.hosts)

    class Broken(State):
        def save(self, fileobj):
            raise KeyError("broken")

    values = Values(comm)
    values.states.append(Broken("broken"))
    with scene.manager(values) as manager:
        with same_error(comm, StageError, "broken"):
            manager.save(1, level="local").wait()
        manager.remove("broken")
        if comm.size > 1:
            values.arrays["x0"][0] = comm.rank
            with same_error(comm, DivergedError, "arrays"):
                manager.save(1, level="local")
        values.go_to(1)
        assert manager.save(1, level="local").wait().generation


def test_wrong_use_is_refused(scene, comm):
    scene.on_hosts(scene.hosts)
    values = Values(comm)
    with scene.manager(values) as manager:
        for wrong in ({"sync": False}, {"only": ["arrays"]}):
            with same_error(comm, OptionsError, "needs"):
                manager.save(1, level="local", **wrong)
    with (
        CheckpointManager(scene.directory, values.states) as manager,
        same_error(comm, OptionsError, "needs"),
    ):
        manager.save(1, level="local")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_steps_save_to_hosts_and_directory_in_turn(scene, comm, asynchronous):
    scene.on_hosts(scene.hosts)
    values = Values(comm)

    def train():
        local = scene.local(every=2)
        options = {"asynchronous": asynchronous, "interval": 5}
        with scene.manager(values, local=local, **options) as manager:
            assert manager.restore() is None
            for step in range(1, 14):
                values.go_to(step)
                manager.step()
            manager.wait()
            raise Crash

    with pytest.raises(Crash):
        train()
    comm.Barrier()
    scene.saved_by = dict.fromkeys(range(20), comm.size)
    assert list(scene.path.glob("local/*/*/checkpoint-*"))
    restored, _ = scene.run(0)
    # While a save of the directory is pending, the local one waits for its end.
    assert restored.step in ((10, 12, 13) if asynchronous else (12,))
    assert restored.level == ("directory" if restored.step == 10 else "local")


def test_a_time_between_local_saves(scene, comm):
    scene.on_hosts(scene.hosts)
    values = Values(comm)

    def train():
        with scene.manager(
            values, local=scene.local(every=timedelta(microseconds=1))
        ) as manager:
            for step in range(1, 8):
                values.go_to(step)
                manager.step()
            raise Crash

    with pytest.raises(Crash):
        train()
    comm.Barrier()
    scene.saved_by = dict.fromkeys(range(20), comm.size)
    assert scene.run(0)[0].step >= 5


def test_a_copy_in_memory_comes_first_and_is_never_older(scene, comm):
    scene.on_hosts(scene.hosts)
    values, memory = Values(comm), Memory()

    def train(first, last):
        with scene.manager(values, memory=memory) as manager:
            restored = manager.restore()
            for step in range(first, last + 1):
                values.go_to(step)
                assert manager.save(step, level="local").wait().generation
                assert memory.step == step
            if last == 5:
                raise Crash
            return restored

    with pytest.raises(Crash):
        train(1, 5)
    comm.Barrier()
    restored = train(6, 6)
    assert (restored.level, restored.step, restored.from_memory) == ("memory", 5, True)
    scene.saved_by = dict.fromkeys(range(20), comm.size)
    # What the run before has kept is still on the way back.
    scene.on_root(lambda: [
        path.rename(path.parent / ".partial-00000006-a")
        for path in scene.path.glob("local/*/*/checkpoint-00000006")
    ])  # fmt: skip
    restored, _ = scene.run(0)
    assert (restored.level, restored.step) == ("local", 5)


def test_a_manager_without_local_leaves_hosts_alone(scene, comm):
    scene.run(3, durable=[1])
    scene.on_hosts(scene.hosts)
    state = ArrayState("arrays", {"x": np.zeros(2)})
    options = Options(strict=False, deadline_seconds=35, preemption_signals=())
    with CheckpointManager(scene.directory, [state], options=options) as manager:
        assert manager.restore(only=[]).step == 1
