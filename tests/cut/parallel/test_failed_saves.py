# SPDX-License-Identifier: Apache-2.0
"""A save of cut state that fails on one rank: one error for all, and nothing happened."""

import errno
import os

import numpy as np
import pytest

from mpi_ckpt.engine.save.cut import own_tiles
from mpi_ckpt.errors import (
    CheckpointError,
    DivergedError,
    RegistrationError,
    SaveError,
    StageError,
    WriteError,
)
from mpi_ckpt.options import IO
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.writing import space
from tests.cut import cuts
from tests.cut.mixture import SHAPE, Mixture
from tests.directories import names_in
from tests.ranks import manager, same_error

WAYS = {
    "root blocking": {"writers": "root"},
    "all asynchronous": {"writers": "all", "asynchronous": True},
    "node overlapped": {"writers": "node", "asynchronous": True, "overlap": True},
}


class Job:
    """A manager of a mixture that has saved generation 1, on all ranks."""

    def __init__(self, comm, root, *, overlap=False, **options):
        self.comm, self.root = comm, root
        self.states = Mixture(comm, overlap=overlap)
        io = IO(mode="buffered")
        self.manager = manager(root, *self.states.states, comm=comm, io=io, **options)
        self.save(1)

    def save(self, step):
        self.states.move(step)
        return self.manager.save(step=step).wait()

    def fails(self, *expected):
        """Require a save to fail with an error on all ranks, and to leave nothing."""
        with same_error(self.comm, *expected) as caught:
            self.save(2)
        self.assert_nothing_happened()
        return caught.error

    def assert_nothing_happened(self):
        """Require generation 1 to be all there is, and whole."""
        assert [info.generation for info in self.manager.generations()] == [1]
        assert self.names() == [".lock", "checkpoint-00000001"]
        self.states.move(9)
        self.manager.restore()
        assert self.states.problems(1) == []

    def goes_on(self):
        """Require the next save to work."""
        assert self.save(3).generation == 2
        self.states.move(9)
        assert self.manager.restore().generation == 2
        assert self.states.problems(3) == []
        assert self.names() == [".lock", "checkpoint-00000001", "checkpoint-00000002"]
        self.manager.close()

    def names(self):
        """Return what the directory holds, as root sees it."""
        here = self.comm.rank == 0
        return self.comm.bcast(names_in(self.root) if here else 0)


@pytest.fixture(params=WAYS)
def job(peers, shared_path, request):
    return Job(peers, shared_path, **WAYS[request.param])


def last(comm):
    return comm.size - 1


class FailingCall:
    """Fails the n-th call of a file function on one rank, counted from when it is armed."""

    def __init__(self, monkeypatch, name, code, *, here):
        self.function = getattr(filesystem, name)
        self.code = code
        self.left = None
        if here:
            monkeypatch.setattr(filesystem, name, self.call)

    def call(self, *arguments, **options):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise OSError(self.code, os.strerror(self.code))
        return self.function(*arguments, **options)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("create_file", errno.ENOSPC),
        ("write_all", errno.ENOSPC),
        ("sync_file", errno.EIO),
        ("sync_directory", errno.EIO),
        ("list_names", errno.EIO),
    ],
)
def test_each_call_that_fails_on_the_last_rank(peers, job, monkeypatch, name, code):
    failing = FailingCall(monkeypatch, name, code, here=peers.rank == last(peers))
    for number in range(1, 50):
        failing.left, error = number, None
        try:
            job.save(2)
        except CheckpointError as caught:
            error = caught
        failing.left = None
        found = peers.allgather((type(error).__name__, str(error)))
        assert len(set(found)) == 1, found
        if error is None:
            break
        assert isinstance(error, WriteError)
        assert error.errno == code
        assert f"rank {last(peers)} of {peers.size} on " in str(error)
        job.assert_nothing_happened()
    assert number > 1, "the function was never called"
    job.states.move(9)
    assert job.manager.restore().generation == 2
    assert job.states.problems(2) == []
    job.manager.close()


def test_no_room_for_the_tiles_of_one_rank(peers, job, monkeypatch):
    with monkeypatch.context() as patch:
        if peers.rank == last(peers):
            full = space.FreeSpace(100, float("inf"))
            patch.setattr(space, "free_space", lambda _: full)
            patch.setattr(filesystem, "reserve", lambda *_: False)
        error = job.fails(WriteError, f"rank {last(peers)} of", "100 bytes", "make room")
        assert error.errno == errno.ENOSPC
    job.goes_on()


def test_a_capture_that_raises_on_one_rank(peers, job, monkeypatch):
    with monkeypatch.context() as patch:
        if peers.rank == last(peers):

            def refuse():
                raise ZeroDivisionError("moved away")

            patch.setattr(job.states.field, "capture", refuse)
        job.fails(StageError, f"rank {last(peers)} of", "state 'field'", "moved away")
    job.goes_on()


def test_a_capture_that_is_interrupted_on_one_rank(peers, job):
    def interrupted():
        raise KeyboardInterrupt

    job.states.move(2)
    if peers.rank == last(peers):
        job.states.rows.capture = interrupted
    with pytest.raises(KeyboardInterrupt if peers.rank == last(peers) else StageError):
        job.manager.save()
    if peers.rank == last(peers):
        del job.states.rows.capture
    job.assert_nothing_happened()
    job.goes_on()


def test_memory_that_cannot_be_read_while_it_is_written(peers, job, monkeypatch):
    with monkeypatch.context() as patch:
        if peers.rank == last(peers):

            def unreadable(_leaf):
                raise RuntimeError("device lost")

            patch.setattr(own_tiles, "runs_of", unreadable)
        job.fails(SaveError, f"rank {last(peers)} of", "leaf '", "device lost")
    job.goes_on()


def test_a_hole_and_then_the_boxes_of_before(peers, job):
    """What was found out of the boxes at the save before must still be right."""
    boxes, blocks = job.states.boxes, job.states.field.blocks["x"]
    if peers.rank == last(peers):
        job.states.field.blocks["x"], job.states.boxes = [], []
    with same_error(peers, StageError, "state 'field', leaf 'x'", "no rank"):
        job.save(2)
    if peers.rank == last(peers):
        job.states.field.blocks["x"], job.states.boxes = blocks, boxes
    job.assert_nothing_happened()
    job.goes_on()


def test_replicas_that_differ_and_then_do_not(peers, shared_path):
    job = Job(peers, shared_path)
    one = job.states
    one.boxes = [((0, 0), SHAPE)]
    one.field.blocks["x"] = cuts.blocks(one.field_at(2), one.boxes)
    if peers.rank == last(peers):
        one.field.blocks["x"][0].array[0, 0] = -1
    with same_error(peers, DivergedError, "state 'field', leaf 'x'", f"rank {last(peers)}"):
        job.manager.save()
    job.assert_nothing_happened()
    job.goes_on()


@pytest.mark.parametrize("way", WAYS)
def test_a_directory_that_one_rank_does_not_see(
    peers, tmp_path, shared_path, monkeypatch, way
):
    root = tmp_path / "elsewhere" if peers.rank == last(peers) else shared_path
    options = dict(WAYS[way])
    states = Mixture(peers, overlap=options.pop("overlap", False))
    created = []
    real = filesystem.create_file

    def create(path, **options):
        created.append(path.name)
        return real(path, **options)

    monkeypatch.setattr(filesystem, "create_file", create)
    with manager(root, *states.states, comm=peers, **options) as ours:
        for _ in range(2):
            with same_error(
                *(peers, WriteError, f"rank {last(peers)} of", "does not see it"),
                "state that is cut over ranks",
            ):
                ours.save()
            assert peers.allgather(created) == [[]] * peers.size
            names = names_in(shared_path)
            assert peers.bcast(names) == [".lock"]
        assert ours.generations() == []


def test_a_rank_that_lacks_the_state(peers, shared_path):
    states = Mixture(peers)
    mine = states.states[1 if peers.rank == last(peers) else 0 :]
    with same_error(peers, RegistrationError, "field", f"rank {last(peers)}"):
        manager(shared_path, *mine, comm=peers)
    assert peers.bcast(sorted(shared_path.iterdir())) == []
    with manager(shared_path, *states.states, comm=peers) as ours:
        states.move(1)
        assert ours.save().generation == 1


def test_an_empty_rank_fails_like_any_other(peers, shared_path, monkeypatch):
    """All of the field is on the last rank: the others fail, though they write no tile."""
    states = Mixture(peers, cuts.last_has_all)
    states.rows.arrays = {
        name: column if peers.rank == last(peers) else column[:0]
        for name, column in states.rows_at(1).items()
    }
    count = len(states.rows.arrays["number"])
    with manager(shared_path, *states.states, comm=peers) as ours:
        with monkeypatch.context() as patch:
            if peers.rank == last(peers):

                def full(_descriptor):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

                patch.setattr(filesystem, "sync_file", full)
            with same_error(peers, WriteError, f"rank {last(peers)} of", "ENOSPC"):
                ours.save()
        assert ours.generations() == []
        ours.save()
        ours.restore()
    rows = peers.allreduce(len(states.rows.arrays["number"]))
    assert rows == peers.allreduce(count)
    assert np.concatenate(peers.allgather(states.rows.arrays["number"])).size == rows
