# SPDX-License-Identifier: Apache-2.0
"""A save that fails anywhere: one error for all, older generations stay, the next works."""

import errno
import os
import socket

import numpy as np
import pytest

from mpi_ckpt import ArrayState, ObjectState, State
from mpi_ckpt.errors import CheckpointError, LockedError, SaveError, StageError, WriteError
from mpi_ckpt.options import IO
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.owning import lock
from tests.directories import names_in
from tests.ranks import manager, same_error

HOST = socket.gethostname()


class Stream(State):
    """A plain state whose save can be told to fail."""

    def __init__(self):
        super().__init__("stream")
        self.text = "first"
        self.error = None

    def save(self, fileobj):
        fileobj.write(self.text.encode() * 1000)
        if self.error is not None:
            raise self.error

    def load(self, fileobj):
        self.text = fileobj.read().decode()[: len("first")]


class Job:
    def __init__(self):
        self.array = ArrayState("array", {"x": np.full(5000, 1.0)})
        self.object = ObjectState("object", {"n": 1})
        self.stream = Stream()
        self.states = [self.array, self.object, self.stream]

    def change(self):
        self.array.arrays["x"][:] = 2
        self.object.value = {"n": 2}
        self.stream.text = "other"

    def is_first(self):
        return (
            (self.array.arrays["x"] == 1).all()
            and self.object.value == {"n": 1}
            and self.stream.text == "first"
        )


@pytest.fixture
def job():
    return Job()


def names(comm, path):
    """Return what a directory holds, as root sees it."""
    return comm.bcast(names_in(path) if comm.rank == 0 else None)


def assert_nothing_happened(comm, checkpoints, root, job):
    """Require generation 1 to be all there is, whole, and the next save to work."""
    assert [info.generation for info in checkpoints.generations()] == [1]
    assert names(comm, root) == [".lock", "checkpoint-00000001"]
    job.change()
    checkpoints.restore()
    assert job.is_first()
    job.change()
    assert checkpoints.save().generation == 2
    assert names(comm, root) == [".lock", "checkpoint-00000001", "checkpoint-00000002"]
    checkpoints.restore()
    assert job.object.value == {"n": 2}


def test_a_file_where_the_directory_should_be(comm, shared_path, job):
    root = shared_path / "occupied"
    if comm.rank == 0:
        root.write_text("something else")
    comm.barrier()
    with manager(root, *job.states) as checkpoints:
        for _ in range(2):
            with same_error(
                comm, SaveError, f"rank 0 of {comm.size} on {HOST}", root
            ) as caught:
                checkpoints.save()
            assert caught.error.errno in (errno.EEXIST, errno.ENOTDIR)
        comm.barrier()
        if comm.rank == 0:
            root.unlink()
        comm.barrier()
        assert checkpoints.save().generation == 1


def test_a_file_where_a_parent_should_be(comm, shared_path, job):
    if comm.rank == 0:
        (shared_path / "file").write_text("")
    comm.barrier()
    with manager(shared_path / "file" / "deep" / "er", *job.states) as checkpoints:
        with same_error(comm, SaveError, "ENOTDIR", shared_path / "file") as caught:
            checkpoints.save()
        assert caught.error.errno == errno.ENOTDIR


def test_save_of_a_plain_state_that_fails_on_root(comm, shared_path, job):
    with manager(shared_path, *job.states) as checkpoints:
        checkpoints.save()
        job.stream.error = ZeroDivisionError("within save")
        with same_error(
            comm,
            StageError,
            f"rank 0 of {comm.size} on {HOST}, saving",
            "save() of state 'stream': ZeroDivisionError('within save')",
        ):
            checkpoints.save()
        job.stream.error = None
        assert_nothing_happened(comm, checkpoints, shared_path, job)


def test_a_plain_state_that_finds_the_disk_full(comm, shared_path, job):
    with manager(shared_path, *job.states) as checkpoints:
        checkpoints.save()
        job.stream.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with same_error(
            comm, WriteError, "stream.bin", "the file system is full"
        ) as caught:
            checkpoints.save()
        assert caught.error.errno == errno.ENOSPC
        assert isinstance(caught.error, OSError)
        job.stream.error = None
        assert_nothing_happened(comm, checkpoints, shared_path, job)


def test_a_value_that_one_rank_cannot_save(comm, shared_path, job):
    last = comm.size - 1
    with manager(shared_path, *job.states) as checkpoints:
        checkpoints.save()
        if comm.rank == last:
            job.object.value = {"deep": [1, object()]}
        with same_error(
            comm,
            StageError,
            f"rank {last} of {comm.size} on {HOST}, capturing the states",
            "deep/1 is of type builtins.object",
        ) as caught:
            checkpoints.save()
        assert [failure.rank for failure in caught.error.failures] == [last]
        job.object.value = {"n": 1}
        assert_nothing_happened(comm, checkpoints, shared_path, job)


def test_a_capture_that_is_interrupted(comm, shared_path, job):
    last = comm.size - 1

    def interrupted():
        if comm.rank == last:
            raise KeyboardInterrupt
        return ArrayState.capture(job.array)

    with manager(shared_path, *job.states) as checkpoints:
        checkpoints.save()
        job.array.capture = interrupted
        expected = KeyboardInterrupt if comm.rank == last else StageError
        with pytest.raises(expected):
            checkpoints.save()
        del job.array.capture
        assert_nothing_happened(comm, checkpoints, shared_path, job)


CALLS = [
    "sync_file",
    "sync_directory",
    "create_file",
    "write_all",
    "make_directory",
    "rename_new",
    "list_names",
]


class FailingCall:
    """Fails the n-th call of a file function on root, counted from when it is armed."""

    def __init__(self, comm, monkeypatch, name, code):
        self.function = getattr(filesystem, name)
        self.code = code
        self.left = None
        self.failed = False
        if comm.rank == 0:
            monkeypatch.setattr(filesystem, name, self.call)

    def arm(self, number):
        self.left, self.failed = number, False

    def call(self, *arguments, **options):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.failed = True
                raise OSError(self.code, os.strerror(self.code))
        return self.function(*arguments, **options)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("name", CALLS)
def test_a_file_function_that_fails_at_each_call(
    comm, shared_path, job, monkeypatch, name, code
):
    failing = FailingCall(comm, monkeypatch, name, code)
    with manager(shared_path, *job.states, io=IO(mode="buffered")) as checkpoints:
        checkpoints.save()
        number = 0
        while True:
            number += 1
            job.change()
            job.array.arrays["x"][0] = number
            failing.arm(number)
            error = None
            try:
                checkpoints.save()
            except CheckpointError as caught:
                error = caught
            failing.arm(None)
            found = comm.allgather((type(error).__name__, str(error)))
            assert len(set(found)) == 1, found
            generations = [info.generation for info in checkpoints.generations()]
            if error is None:
                break
            assert isinstance(error, SaveError) or name == "list_names"
            assert f"rank 0 of {comm.size} on {HOST}, " in str(error)
            assert errno.errorcode[code] in str(error)
            assert error.errno == code
            assert generations == [1]
            left = names(comm, shared_path)
            # After a rename whose fsync failed, removing is for the next save.
            if name == "sync_directory":
                left = [entry for entry in left if not entry.startswith(".partial-")]
            assert left == [".lock", "checkpoint-00000001"]
            checkpoints.restore()
            assert job.is_first()
        assert number > 1, "the function was never called"
        assert generations == [1, 2]
        left = names(comm, shared_path)
        assert left == [".lock", "checkpoint-00000001", "checkpoint-00000002"]


def test_a_directory_of_another_job(comm, shared_path, job, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(lock.DirectoryLock.__init__, "__defaults__", (0.1,))
    with manager(shared_path, *job.states) as checkpoints:
        checkpoints.save()
        with manager(shared_path, *Job().states) as other:
            for call in (other.save, other.restore):
                with same_error(comm, LockedError, "belongs to another running job", HOST):
                    call()
        assert checkpoints.save().generation == 2
    with manager(shared_path, *job.states) as checkpoints:
        assert checkpoints.restore().generation == 2


def test_leftovers_are_swept_by_the_next_job(comm, shared_path, job):
    with manager(shared_path, *job.states) as checkpoints:
        checkpoints.save()
    leftover = shared_path / ".partial-00000002-abcdef"
    if comm.rank == 0:
        leftover.mkdir()
        (leftover / "rank-00000.safetensors").write_bytes(b"torn")
    comm.barrier()
    with manager(shared_path, *job.states) as checkpoints:
        checkpoints.restore()
        assert names(comm, shared_path) == [".lock", "checkpoint-00000001"]
        assert checkpoints.save().generation == 2


def test_metrics_that_are_no_numbers(comm, shared_path, job):
    with manager(shared_path, *job.states) as checkpoints:
        checkpoints.save()
        with same_error(comm, SaveError, "metric 'loss' is of type str"):
            checkpoints.save(metrics={"loss": "low"})
        with same_error(comm, SaveError, "step is 'last'"):
            checkpoints.save(step="last")
        assert_nothing_happened(comm, checkpoints, shared_path, job)
