# SPDX-License-Identifier: Apache-2.0
"""What tests ask of all ranks together."""

import random
from contextlib import contextmanager
from dataclasses import replace

from mpi_ckpt import CheckpointManager, Options

_THROUGH = 9


def assert_same(comm, value):
    """Require an equal value on every rank."""
    everyone = comm.allgather(value)
    assert all(record == everyone[0] for record in everyone), everyone


class Caught:
    """The exception that a block ended with on this rank."""

    error = None


@contextmanager
def same_error(comm, expected, *parts):
    """Require a block to end with the same class and message on every rank.

    The ranks compare notes even where nothing was raised, so that none is left waiting.
    """
    caught = Caught()
    try:
        yield caught
    except Exception as error:
        caught.error = error
    error = caught.error
    found = comm.allgather((type(error).__name__, str(error)))
    assert {kind for kind, _ in found} == {expected.__name__}, found
    assert len(set(found)) == 1, found
    for part in parts:
        assert str(part) in found[0][1], (part, found[0][1])


@contextmanager
def coming_late(peers, *late):
    """Let ranks come to what is inside only when all others are through with it."""
    peers.barrier()
    punctual = [rank for rank in range(peers.size) if rank not in late]
    if peers.rank in late:
        for rank in punctual:
            peers.recv(source=rank, tag=_THROUGH)
    try:
        yield
    finally:
        if peers.rank not in late:
            for rank in late:
                peers.send(None, dest=rank, tag=_THROUGH)


def on_first(comm, size, work):
    """Let the first ranks do collective work on a communicator of their own."""
    part = comm.Split(int(comm.rank >= size), comm.rank)
    try:
        return work(part) if comm.rank < size else None
    finally:
        part.Free()
        comm.Barrier()


def manager(root, *states, comm=None, deadline_seconds=35.0, **options):
    """Make a manager whose ranks do not wait for long when a test goes wrong."""
    options.setdefault("preemption_signals", ())
    return CheckpointManager(
        root,
        states,
        comm=comm,
        options=Options(deadline_seconds=deadline_seconds, **options),
    )


def plain(report):
    """Return a report without what differs between ranks by nature: seconds."""
    return replace(report, seconds={})


def randoms(seed):
    """Return a random stream that is the same on every rank."""
    return random.Random(f"mpi_ckpt {seed}")


def groupings(size):
    """Return every way to lay ranks on hosts, as the host names in rank order."""
    found = [""]
    for _ in range(size):
        found = [hosts + host for hosts in found for host in "abcd"[: len(set(hosts)) + 1]]
    return found


class RecordingHandle:
    """Stands in for an mpi4py communicator and notes the bytes of each message.

    Attributes:
        messages: Function and bytes of everything posted.
    """

    def __init__(self, communicator):
        self._communicator = communicator
        self._handle = communicator.handle
        self.messages = []

    def __getattr__(self, name):
        function = getattr(self._handle, name)
        if name not in ("Iallgather", "Iallreduce", "Ibcast", "Igather", "Isend", "Irecv"):
            return function

        def post(buffer, *arguments, **options):
            self.messages.append((name, buffer.nbytes))
            return function(buffer, *arguments, **options)

        return post

    def __enter__(self):
        self._communicator.handle = self
        return self

    def __exit__(self, *_):
        self._communicator.handle = self._handle

    @property
    def largest(self):
        return max([nbytes for _, nbytes in self.messages], default=0)

    def sent_by(self, function):
        return sum(nbytes for name, nbytes in self.messages if name == function)
