# SPDX-License-Identifier: Apache-2.0
"""Starts replacements for lost ranks: the same program, which finds out its role."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import Tag, keep_forever
from mpi_ckpt.comm.ulfm.guard import Guard, end_as_lost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi4py import MPI
    from numpy.typing import NDArray

_CONNECT_SECONDS = 15.0
_STAGGER_SECONDS = 3.0
_LETTER_BYTES = 2048
_CONNECTING = "connecting with a new rank"
_NUMBERS = 3

# MPI: a new rank whose parents die waits in MPI_Init for ever, and mpirun for it. An alarm
# survives exec, and needs no running interpreter.
_START = (
    "import os, signal, sys; signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1])); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)

# MPI: communicators between ranks of several launches. MPI_Finalize waits for all these
# ranks, dead or not, unless the communicator was freed.
_MADE: list[MPI.Comm] = []


def is_spawned() -> bool:
    """Return whether this process was started in place of a lost rank. Not collective."""
    mpi = load_mpi()
    return bool(mpi.Comm.Get_parent() != mpi.COMM_NULL)


class Start:
    """Starts this program again, as one new rank, which calls `join`.

    Collective. Only one survivor starts it: all ranks that take part in a start wait for
    ever if one of them dies meanwhile (Open MPI 5.0, in PMIx_Connect). Then all connect,
    which takes a hundredth of the time. Ranks start one at a time, each as its own launch:
    if a rank of a later launch dies, Open MPI 5.0 ends all ranks of that launch.

    Args:
        handle: Communicator of the present ranks.
        starter: The rank that starts the new one.
        more: Number of ranks to start after this one.
        seconds: How long the program may take from its start to `join`.
    """

    def __init__(
        self, handle: MPI.Intracomm, starter: int, more: int, seconds: float
    ) -> None:
        self._handle = handle
        self._starter = starter
        self._more = more
        self._seconds = seconds
        self._port = ""

    def begin(self) -> MPI.Comm:
        """Start the rank, from one rank; the others do not wait here.

        Collective. Main thread only.

        Returns:
            The communicator to revoke if the start fails.
        """
        mpi = load_mpi()
        if self._handle.rank != self._starter:
            null: MPI.Comm = mpi.COMM_NULL
            return null
        info = mpi.Info.Create()
        info.Set("wdir", os.getcwd())  # noqa: PTH109 (a text is wanted)
        if _spans_hosts():
            # MPI: the other ranks often cannot reach a new rank on a host other than its
            # starter's, or it ends in MPI_Init (Open MPI 5.0).
            info.Set("host", mpi.Get_processor_name())
        # Start it like this process: with its options, as a module or a file.
        wait = str(self._seconds)
        program = ["-IS", "-c", _START, wait, sys.executable, *sys.orig_argv[1:]]
        with Guard("starting a rank in place of a lost one", self._seconds):
            between: MPI.Intercomm = mpi.COMM_SELF.Spawn(
                sys.executable, program, maxprocs=1, info=info
            )
            remember(between)
            self._port = mpi.Open_port()
            letter = [self._port, str(self._starter), str(self._more), wait]
            between.Bcast(_pack(letter), root=mpi.ROOT)
        info.Free()
        return between

    def accept(self) -> MPI.Intercomm:
        """Connect all present ranks with the new one. Collective. Main thread only."""
        # If one rank's guard ends it, the rest may return: so the limits differ, and root's
        # is the longest.
        behind = self._handle.size - 1 - self._handle.rank
        with Guard(_CONNECTING, _CONNECT_SECONDS + _STAGGER_SECONDS * behind):
            return self._handle.Accept(self._port, root=self._starter)


def join() -> tuple[MPI.Intracomm, tuple[int, ...]]:
    """Return to a replacement the communicator of all ranks, and their greeting.

    Collective. Main thread only. This rank is one of the last in it. If a rank dies
    meanwhile, the others go on without this one, which does not return.
    """
    mpi = load_mpi()
    signal.setitimer(signal.ITIMER_REAL, 0)
    letter, numbers = _pack([]), np.zeros(_NUMBERS, np.int64)
    try:
        with Guard("joining the others in place of a lost rank", 2 * _CONNECT_SECONDS):
            parent = mpi.Comm.Get_parent()
            parent.Bcast(letter, root=0)
            port, starter, more, wait = letter.tobytes().rstrip(b"\0").decode().split("\n")
            merged = merge(mpi.COMM_SELF.Connect(port), high=True)
        remember(parent)
        for _ in range(int(more)):
            # The next rank has not started yet.
            with Guard(_CONNECTING, float(wait) + 2 * _CONNECT_SECONDS):
                between = merged.Accept("", root=int(starter))
            merged = merge(between, high=False)
        with Guard("receiving the position of the job", 2 * _CONNECT_SECONDS):
            _introduce(merged)
            merged.Bcast(numbers)
    except mpi.Exception as error:
        # The others have begun again, and start another rank in its place.
        sys.stderr.write(f"mpi_ckpt: this replacement is not needed: {error}\n")
        sys.stderr.flush()
        end_as_lost()
    return merged, tuple(numbers.tolist())


def _spans_hosts(environ: Mapping[str, str] = os.environ) -> bool:
    total = environ.get("OMPI_COMM_WORLD_SIZE")
    return is_spawned() or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") != total


def choose_starter(handle: MPI.Intracomm) -> int:
    """Return the rank that starts others: the last one of the first launch, if any is left.

    Collective. Main thread only.
    """
    first = np.empty(handle.size, np.int64)
    handle.Allgather(np.array([not is_spawned()], np.int64), first)
    return int(max(np.flatnonzero(first), default=handle.size - 1))


def merge(between: MPI.Intercomm, *, high: bool) -> MPI.Intracomm:
    """Merge two sides into one communicator. Collective. Main thread only."""
    remember(between)
    # MPI: if a rank dies just here, the others never return, whatever is revoked (Open MPI
    # 5.0, in ompi_comm_nextcid). The call takes a few milliseconds.
    with Guard("joining with a new rank", _CONNECT_SECONDS):
        merged = between.Merge(high=high)
    remember(merged)
    return merged


def _pack(lines: Sequence[str]) -> NDArray[np.uint8]:
    text = "\n".join(lines).encode()
    return np.frombuffer(bytearray(text.ljust(_LETTER_BYTES, b"\0")), np.uint8)


def greet(handle: MPI.Intracomm, numbers: Sequence[int]) -> None:
    """Send the new ranks the state of the job. Collective, on the present ranks.

    Main thread only.

    Args:
        handle: Communicator of all ranks, including the new ones.
        numbers: Three numbers, the same on every rank.
    """
    with Guard("meeting new ranks", 2 * _CONNECT_SECONDS):
        _introduce(handle)
        handle.Bcast(np.array(numbers, np.int64))


def _introduce(handle: MPI.Intracomm) -> None:
    """Make each rank exchange a message with each other. Collective."""
    # MPI: when a rank dies, Open MPI 5.0 sends word of it to the others. To a dead rank
    # that this one never exchanged a message with, it searches a route for ever.
    mpi = load_mpi()
    token, into = np.zeros(1, np.uint8), np.zeros(handle.size, np.uint8)
    others = [rank for rank in range(handle.size) if rank != handle.rank]
    posted = [
        *(handle.Irecv(into[rank : rank + 1], rank, Tag.GREETING) for rank in others),
        *(handle.Isend(token, rank, Tag.GREETING) for rank in others),
    ]
    try:
        mpi.Request.Waitall(posted)
    except mpi.Exception:
        keep_forever(posted, token, into)
        raise


def remember(*handles: MPI.Comm) -> None:
    """Note communicators to free before this process can leave. Not collective."""
    _MADE.extend(handles)


def made() -> list[MPI.Comm]:
    """Return the noted communicators. Not collective."""
    return _MADE
