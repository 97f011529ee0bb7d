# SPDX-License-Identifier: Apache-2.0
"""Saves behind the training."""

import errno
import gc
import os
import threading
import time

import numpy as np
import pytest

from mpi_ckpt import ArrayState, CheckpointManager, KeepLast, Options, State
from mpi_ckpt.errors import SaveError, WriteError
from mpi_ckpt.storage import filesystem

SIZE = 5000


def options(**more):
    return Options(**{"asynchronous": True, "preemption_signals": (), **more})


@pytest.fixture
def gate(monkeypatch):
    """Holds up the first fsync of each save until opened."""
    opened = threading.Event()
    real = filesystem.sync_file

    def held(descriptor):
        opened.wait(30)
        real(descriptor)

    monkeypatch.setattr(filesystem, "sync_file", held)
    yield opened
    opened.set()


def restored(path, comm, state):
    with CheckpointManager(path, [state], comm=comm) as manager:
        return manager.restore()


def test_what_is_saved_is_the_state_at_the_save(comm, shared_path, gate):
    array = np.full(SIZE, 1.0)
    with CheckpointManager(
        shared_path, [ArrayState("a", {"x": array})], comm=comm, options=options()
    ) as manager:
        pending = manager.save(step=7)
        array[:] = 2.0  # while it is being written
        assert not pending.done()
        gate.set()
        report = pending.wait()
        assert pending.done()
        assert pending.wait() is report is pending.report
        assert manager.generations()[-1].generation == report.generation
        manager.restore()
        assert (array == 1.0).all()
        assert manager.steps == 7


def test_close_finishes_what_is_pending(comm, shared_path):
    array = np.full(SIZE, 3.0)
    with CheckpointManager(
        shared_path, [ArrayState("a", {"x": array})], comm=comm, options=options()
    ) as manager:
        manager.save()
    array[:] = 0
    assert restored(shared_path, comm, ArrayState("a", {"x": array})).generation == 1
    assert (array == 3.0).all()


def test_step_acknowledges_and_the_next_save_waits(comm, shared_path):
    array = np.zeros(SIZE)
    with CheckpointManager(
        shared_path,
        [ArrayState("a", {"x": array})],
        comm=comm,
        options=options(interval=2, retention=KeepLast(2)),
    ) as manager:
        for _ in range(9):
            array += 1
            assert manager.step() is False
        manager.wait()
        assert [info.step for info in manager.generations()] == [6, 8]
    array[:] = 0
    assert restored(shared_path, comm, ArrayState("a", {"x": array})).step == 8
    assert (array == 8).all()


def test_step_finishes_a_save_that_is_written(comm, shared_path):
    manager = CheckpointManager(
        shared_path, [ArrayState("a", {"x": np.ones(3)})], comm=comm, options=options()
    )
    with manager:
        pending = manager.save()
        deadline = time.monotonic() + 30
        while not pending.finished and time.monotonic() < deadline:
            manager.step()
        assert pending.report.generation == 1


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_save_while_one_is_pending(comm, shared_path, gate, policy):
    with CheckpointManager(
        shared_path,
        [ArrayState("a", {"x": np.ones(SIZE)})],
        comm=comm,
        options=options(asynchronous=policy),
    ) as manager:
        first = manager.save()
        if policy == "skip":
            assert manager.save() is first
        else:
            with pytest.raises(SaveError, match="still under way"):
                manager.save()
        gate.set()
        assert first.wait().generation == 1
        assert manager.save().wait().generation == 2


def step_forever(manager):
    while True:
        manager.step()


@pytest.mark.parametrize("where", ["wait", "step", "save", "close"])
def test_a_failure_behind_is_raised_on_all_ranks(comm, shared_path, monkeypatch, where):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    array = np.ones(SIZE)
    manager = CheckpointManager(
        shared_path, [ArrayState("a", {"x": array})], comm=comm, options=options()
    )
    manager.save().wait()
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "sync_file", fail)
        pending = manager.save()
        calls = {"wait": pending.wait, "close": manager.close, "save": manager.save}
        with pytest.raises(WriteError, match="EIO") as caught:
            calls.get(where, lambda: step_forever(manager))()
    texts = comm.allgather(str(caught.value))
    assert set(texts) == {texts[0]}
    if where != "close":
        with pytest.raises(WriteError):
            pending.wait()  # says it again, if asked
        assert manager.save().wait().generation == 2
        manager.close()
    if comm.rank == 0:
        assert not list(shared_path.glob(".partial-*"))


def test_plain_states_are_written_at_once(comm, shared_path):
    class Words(State):
        text = b"before"

        def save(self, fileobj):
            fileobj.write(self.text)

        def load(self, fileobj):
            self.text = fileobj.read()

    words = Words("words")
    with CheckpointManager(shared_path, [words], comm=comm, options=options()) as manager:
        manager.save()
        words.text = b"after"
        manager.restore()
        assert words.text == b"before"


def test_memory_stays_one_copy(comm, shared_path):
    array = np.ones(1 << 20)
    with CheckpointManager(
        shared_path, [ArrayState("a", {"x": array})], comm=comm, options=options()
    ) as manager:
        sizes = []
        for _ in range(6):
            manager.save().wait()
            sizes.append(resident_bytes())
        assert sizes[-1] - sizes[1] < array.nbytes / 2


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leave_by_close(manager, pending):
    manager.close()


def leave_by_an_error(manager, pending):
    with pytest.raises(KeyError), manager:
        raise KeyError("mine")


def leave_after_a_failure(manager, pending):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filesystem, "sync_file", refuse)
        with pytest.raises(WriteError), manager:
            manager.save().wait()


def drop(manager, pending):
    pending.wait()  # or it would be told that nobody did


def refuse(descriptor):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(
    "leave", [leave_by_close, leave_by_an_error, leave_after_a_failure, drop]
)
@pytest.mark.parametrize("writers", ["root", "all"])
def test_no_thread_is_left(comm, shared_path, leave, writers):
    before = set(threading.enumerate())
    manager = CheckpointManager(
        shared_path,
        [ArrayState("a", {"x": np.ones(9)})],
        comm=comm,
        options=options(writers=writers),
    )
    leave(manager, manager.save())
    del manager
    gc.collect()
    deadline = time.monotonic() + 30
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        assert leave is drop, "joined"
        time.sleep(0.01)
    assert set(threading.enumerate()) - before == set()


def test_what_becomes_of_a_save_that_is_left_is_told_once(comm, shared_path, gate, caplog):
    manager = CheckpointManager(
        shared_path, [ArrayState("a", {"x": np.ones(9)})], comm=comm, options=options()
    )
    manager.save(step=7)
    gate.set()
    with pytest.raises(KeyError), manager:
        raise KeyError("mine")
    del manager
    gc.collect()
    left = "the save of step 7 was left without wait() or close(); generation 1 is durable"
    assert [message for message in caplog.messages if "left" in message] == [left] * (
        comm.rank == 0
    )
    comm.barrier()
    assert restored(shared_path, comm, ArrayState("a", {"x": np.ones(9)})).step == 7
