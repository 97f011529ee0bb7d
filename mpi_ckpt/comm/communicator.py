# SPDX-License-Identifier: Apache-2.0
"""Wraps MPI in the package's own communicator: a duplicate, with deadlines on every wait.

Worker threads never use it; all calls run on the caller's thread, so MPI_THREAD_FUNNELED is
enough.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm import liveness
from mpi_ckpt.comm.admission import (
    check_before,
    divide_by_host,
    duplicate_within,
    exchange_presences,
    exchange_rosters,
    objection_of,
    refuse_if_any_objects,
)
from mpi_ckpt.comm.busy import BusyRanks
from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import (
    ROUNDS_A_LOOK,
    LastMeeting,
    Patience,
    Tag,
    call_roll,
    is_called,
    keep_forever,
)
from mpi_ckpt.comm.presence import Home
from mpi_ckpt.comm.topology import Topology
from mpi_ckpt.errors import CollectiveError, LaunchError
from mpi_ckpt.options import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI
    from numpy.typing import NDArray

_ADVICE = "published generations are untouched, end this job and start it again"

# MPI: after a loss, a rank may wait in any of them for a rank that waits in another. Strong
# references: a communicator stays open though no other code holds it.
_OPEN: dict[int, Communicator] = {}


class Communicator:
    """A private duplicate of a communicator.

    Collective. Main thread only. Freed by `close`.

    Args:
        comm: The user's communicator; None is the world.
        deadline_seconds: How long a wait may take.
        message_bytes: Largest message in bytes, at most 1 GiB.

    Attributes:
        rank, size, root: This rank, the number of ranks, the rank that decides.
        deadline_seconds, message_bytes: As given, or set by `set_limits`.
        hosts: Host name of every rank.
        completed: Number of finished requests; grows as long as ranks meet.
        is_waiting: Whether this rank waits for others.
        topology: The ranks by host.
        node: Communicator of the ranks on this host, in order; None if all are on one host,
            or each on its own.
        ranks_on_host: These ranks, ascending.
        confusions: How often the ranks have found that they were in different calls.
        call: The current public call, for the reports of a wait in it.
        home: The process and thread that made it.
        visible: The processes of the ranks that this process can see.
        busy_ranks: The other ranks that have announced to be busy.
        last_met: The last meeting of all ranks, in words.
        on_wait: Called after each wait with ``doing``, ``streaming``, and its start by
            `time.perf_counter`; None for nobody.

    Raises:
        LaunchError: On every rank, if the launcher or Horovod contradicts MPI.
        CollectiveError: On every live rank, if one never arrives.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        *,
        deadline_seconds: float = 600.0,
        message_bytes: int = 8 << 20,
    ) -> None:
        self._mpi: Any = load_mpi()
        check_before(self._mpi, comm)
        parent = self._mpi.COMM_WORLD if comm is None else comm
        objection = objection_of(self._mpi, parent)
        self.deadline_seconds = deadline_seconds
        self.message_bytes = message_bytes
        self.root = ROOT
        self.confusions = 0
        self.call = "CheckpointManager()"
        self.completed = 0
        self.home = Home()
        self.is_waiting = False
        self._broken: str | None = None
        self._cause: BaseException | None = None
        self._is_given_up = False
        self.last_met = LastMeeting()
        self.on_wait: Callable[[str, bool, float], None] | None = None
        self.handle: MPI.Intracomm = duplicate_within(parent, deadline_seconds)
        self.node: MPI.Comm | None = None
        _OPEN[id(self)] = self
        self.rank: int = self.handle.rank
        self.size: int = self.handle.size
        self.busy_ranks = BusyRanks(self)
        roster = exchange_rosters(self.handle, objection, deadline_seconds)
        try:
            refuse_if_any_objects(roster.objections)
        except LaunchError:
            self.close()  # on every rank, since all have raised
            raise
        self.topology = Topology.make(roster.hosts.texts, roster.hosts.index_of)
        self.hosts = self.topology.hosts
        self.node, self.ranks_on_host = divide_by_host(self.handle, self.topology)
        self.visible = exchange_presences(
            self.node or (self.handle if self.hosts.are_one else self._mpi.COMM_SELF),
            self.ranks_on_host,
            deadline_seconds,
        )

    @property
    def is_root(self) -> bool:
        """Whether this rank is root."""
        return self.rank == self.root

    @property
    def name(self) -> str:
        """The name of this rank in messages."""
        return f"rank {self.rank} of {self.size} on {self.hosts[self.rank]}"

    @property
    def is_broken(self) -> bool:
        """Whether ranks can no longer meet: one was absent, or MPI failed."""
        return self._broken is not None

    @property
    def is_open(self) -> bool:
        """Whether it can carry messages: not freed or given up, MPI not finalized."""
        freed = self._is_given_up or self._mpi.Is_finalized()
        return not freed and self.handle != self._mpi.COMM_NULL

    def require_usable(self) -> None:
        """Refuse at once a call that would wait for ever. Not collective.

        Raises:
            CollectiveError: On the calling rank, in a forked process, in another thread
                than the one that made it, or if it is closed.
        """
        self.home.require(self.call, self.rank)
        if self.handle == self._mpi.COMM_NULL:
            raise CollectiveError(
                f"{self.call}: this manager is closed; make another to save or restore"
            )

    def close(self) -> None:
        """Free the duplicate. Collective. May be called twice.

        After a missed deadline it frees nothing: that would wait for the absent.
        """
        if self.is_open and self.can_meet() and self.busy_ranks.settle():
            _OPEN.pop(id(self), None)
            if self.node is not None:
                self.node.Free()
            self.handle.Free()

    def give_up(self) -> list[MPI.Comm]:
        """Give it up for a repair; return the communicators to revoke. Not collective."""
        _OPEN.pop(id(self), None)
        self._is_given_up = True
        self._broken = self._broken or "a rank was lost, and the others have gone on"
        return [self.handle] if self.node is None else [self.node, self.handle]

    def set_limits(
        self, *, deadline_seconds: float | None = None, message_bytes: int | None = None
    ) -> None:
        """Change the limits that are given. Not collective, but alike on every rank."""
        if deadline_seconds is not None:
            self.deadline_seconds = deadline_seconds
        if message_bytes is not None:
            self.message_bytes = message_bytes

    def can_meet(self) -> bool:
        """Return whether it is open, and no deadline was missed yet. Not collective."""
        try:
            return self._broken is None and self.is_open and not is_called(self.handle)
        except self._mpi.Exception as error:
            self._note_failure(error)
            return False

    def all_reduce(self, values: NDArray[Any], operation: str, doing: str) -> NDArray[Any]:
        """Reduce small vectors over all ranks.

        Collective. Main thread only.

        Args:
            values: 1-d, the same length and dtype on every rank.
            operation: ``"min"``, ``"max"``, ``"sum"`` or ``"bor"`` (bitwise or).
            doing: What the ranks meet for, for the error if one never arrives.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        result = np.empty_like(values)
        most = max(1, self.message_bytes // values.itemsize)
        requests = [
            self.start_all_reduce(
                values[start : start + most], result[start : start + most], operation
            )
            for start in range(0, len(values), most)
        ]
        self.wait(requests, doing, buffers=(values, result))
        self.note_meeting(doing)
        return result

    def note_meeting(self, doing: str) -> None:
        """Note that all ranks have taken part in a meeting. Not collective."""
        self.last_met = LastMeeting(doing, time.monotonic())
        if self.size > 1:
            self.busy_ranks.listen()  # so that no unread messages pile up

    def start_all_reduce(
        self, values: NDArray[Any], result: NDArray[Any], operation: str
    ) -> MPI.Request:
        """Start reducing a vector that fits into one message.

        Collective. Main thread only. The request keeps neither array alive.

        Args:
            values: 1-d, the same length and dtype on every rank.
            result: An array of the same form; set once the request is done.
            operation: ``"min"``, ``"max"``, ``"sum"`` or ``"bor"`` (bitwise or).

        Raises:
            CollectiveError: On the calling rank, as `require_usable` does.
        """
        self.require_usable()
        return self.handle.Iallreduce(
            values, result, op=getattr(self._mpi, operation.upper())
        )

    def wait(
        self,
        requests: Sequence[MPI.Request],
        doing: str,
        *,
        streaming: bool = False,
        buffers: object = None,
    ) -> None:
        """Wait for requests, no longer than the deadline.

        Not collective. Main thread only.

        Args:
            requests: Requests posted on this communicator.
            doing: What the ranks meet for, for the error if one never arrives.
            streaming: Whether data is flowing: the core then makes progress, not sleeps.
            buffers: Buffers that the requests use, but as reductions do not keep alive.

        Raises:
            CollectiveError: On every live rank, if one never arrives, or if an earlier
                wait on this communicator failed.
        """
        pending, start = list(requests), time.perf_counter()
        self.is_waiting = True
        try:
            self._refuse_if_broken(doing)
            self._wait(pending, doing, streaming)
            # The operation of a late rank may succeed, though the others gave it up.
            self._refuse_if_late(doing)
        except BaseException as error:
            keep_forever(pending, buffers)
            if not isinstance(error, self._mpi.Exception):
                raise
            self._note_failure(error)
            raise CollectiveError(f"{doing}: {self._broken}; {_ADVICE}") from error
        finally:
            self.is_waiting = False
            self.busy_ranks.resume()
            if self.on_wait is not None:
                self.on_wait(doing, streaming, start)

    def _wait(self, pending: list[MPI.Request], doing: str, streaming: bool) -> None:
        patience = Patience(self.deadline_seconds, streaming=streaming)
        began, busy = time.monotonic(), self.busy_ranks
        warn_after = liveness.WARNED_SECONDS
        # One request at a time: each test advances all of them, and one test costs least.
        for request in pending:
            while not request.Test():
                if not patience.go_round():
                    continue
                waited = time.monotonic() - began
                if patience.rounds == ROUNDS_A_LOOK:
                    # A late rank sees by now that the others gave up.
                    self._refuse_if_late(doing)
                elif is_called(self.handle) or (
                    (busy.look() or patience.is_over)
                    and not busy.excuse(patience, waited, doing)
                ):
                    self._give_up(doing)
                elif waited > warn_after:
                    warn_after = math.inf
                    liveness.warn_of_wait(self, doing)
            self.completed += 1

    def isend(self, data: NDArray[np.uint8], to: int) -> MPI.Request:
        """Start sending bytes to a rank. Not collective. Main thread only."""
        return self.handle.Isend(data, dest=to, tag=Tag.DATA)

    def irecv(self, into: NDArray[np.uint8], source: int) -> MPI.Request:
        """Start receiving bytes from a rank. Not collective. Main thread only."""
        return self.handle.Irecv(into, source=source, tag=Tag.DATA)

    def _note_failure(self, error: BaseException) -> None:
        self._broken, self._cause = f"MPI failed: {error}", error

    def _refuse_if_late(self, doing: str) -> None:
        if self.size > 1 and is_called(self.handle):
            self._broken = liveness.why_called_off(self)
            self._refuse_if_broken(doing)

    def _refuse_if_broken(self, doing: str) -> None:
        if self._broken is not None:
            raise CollectiveError(
                f"{doing}: ranks cannot meet any more on this communicator: "
                f"{self._broken}; {_ADVICE}"
            ) from self._cause

    def _give_up(self, doing: str) -> None:
        call = call_roll(self.handle)
        self._broken = liveness.what_is_missing(self, call)
        raise liveness.missed_deadline(self, call, doing, _ADVICE)


def open_communicators() -> list[Communicator]:
    """Return the communicators that are neither closed nor given up. Not collective."""
    return list(_OPEN.values())
