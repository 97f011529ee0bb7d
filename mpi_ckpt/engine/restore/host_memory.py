# SPDX-License-Identifier: Apache-2.0
"""Shares the window of a restore among the ranks of each host.

The rank that reads for a host reads into memory that the others of the host can read as
well: bytes that are proven need no message on one host, and each rank copies them once.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import any_of, bcast_on_hosts, bcast_to_hosts
from mpi_ckpt.memory import SharedMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.storage.reading.read_plan import Window
    from mpi_ckpt.storage.reading.read_queue import Slots

_DOING = "sharing memory on each host"

# For fewer bytes it is not worth the agreement.
_LEAST_BYTES = 16 << 20

_TOKEN_BYTES = 16
_COUNT_BYTES = 8

# A rank that waits for a window looks for it so often before it meets the others: waiting
# in MPI takes a core, which the rank that reads needs.
_LOOK_SECONDS = 3e-4
_LOOKS = 150


class HostMemory:
    """Memory of each host for the windows that pass it.

    Collective, unless said otherwise. Main thread only. Its first slots belong to the queue
    of the host's leader; windows that another host reads arrive in one more slot. Its end
    shows that it is this memory, and how many windows the leader has proven.

    Args:
        comm: The communicator.
        windows: All windows of the restore.
        readers: The rank that reads each window; leaders of hosts only.
        slots: The slots of each leader's queue.
    """

    def __init__(
        self,
        comm: Communicator,
        windows: Sequence[Window],
        readers: Sequence[int],
        slots: Slots,
    ) -> None:
        topology = comm.topology
        self._comm = comm
        self._windows = windows
        self._readers = readers
        self._numbers = _numbers_in_queues(readers)
        self._slots = slots
        self._leader = topology.leaders[topology.node_of[comm.rank]]
        self._end = self._slots.nbytes + self._slots.slot_bytes
        self._nbytes = self._end + _TOKEN_BYTES + _COUNT_BYTES
        self._token = os.urandom(_TOKEN_BYTES)
        self._shared: SharedMemory | None = None
        if self._leader == comm.rank:
            with suppress(OSError, ValueError):
                self._shared = SharedMemory.create(self._nbytes)
                self._shared.view[self._end :][:_TOKEN_BYTES] = self._token

    @classmethod
    def of(
        cls,
        comm: Communicator,
        windows: Sequence[Window],
        readers: Sequence[int],
        slots: Slots,
    ) -> HostMemory | None:
        """Return memory for a restore, None where sharing gains nothing.

        Not collective, but all ranks get some, or none. Arguments are those of the class,
        with any readers.
        """
        nbytes = sum(window.end - window.start for window in windows)
        are_leaders = set(readers) <= set(comm.topology.leaders)
        is_alone = len(comm.topology.names) == comm.size
        if is_alone or not are_leaders or nbytes < _LEAST_BYTES:
            return None
        return cls(comm, windows, readers, slots)

    @property
    def memory(self) -> memoryview | None:
        """On a leader the memory of the slots, if there is any. Not collective."""
        return None if self._shared is None else self._shared.view[: self._slots.nbytes]

    def share(self) -> bool:
        """Let the other ranks of each host see the memory; return whether all of them do.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        descriptor = -1 if self._shared is None else self._shared.descriptor
        head = np.array([descriptor], np.int64).tobytes() + self._token
        message = np.frombuffer(head, np.uint8).copy()
        bcast_on_hosts(self._comm, message, _DOING)
        if self._comm.rank != self._leader:
            with suppress(OSError, ValueError):
                self._attach(int(message[:8].view(np.int64)[0]), message[8:].tobytes())
        (lacking,) = any_of(self._comm, _DOING, self._shared is None)
        self.close()
        return not lacking

    def announce(self, number: int) -> None:
        """Show the other ranks of this host that a window is proven. Not collective.

        Args:
            number: Number of the window among all; this rank has read it.
        """
        self._proven[0] = self._numbers[number] + 1

    def look_for(self, number: int) -> None:
        """Sleep until a window is announced on this host, but not for long.

        Not collective. What becomes of the window is agreed on in the meeting that follows.
        """
        reader, topology = self._readers[number], self._comm.topology
        if topology.node_of[reader] != topology.node_of[self._comm.rank]:
            return
        for _ in range(_LOOKS):
            if self._proven[0] > self._numbers[number]:
                return
            time.sleep(_LOOK_SECONDS)

    def deliver(self, number: int, doing: str) -> memoryview:
        """Bring a window to all hosts, once its reader has proven it; return its bytes.

        The bytes stay until the next call, and those of another window of the same reader
        until that reader's queue needs the slot.

        Args:
            number: Number of the window among all.
            doing: What the ranks meet for, for the error if one never arrives.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        assert self._shared is not None
        start, end = self._place(number)
        data = self._shared.view[start:end]
        bcast_to_hosts(self._comm, data, doing, self._readers[number])
        return data

    def forget(self, number: int) -> None:
        """Unmap a window that this rank does not need any more. Not collective."""
        if self._shared is not None and self._comm.rank != self._leader:
            self._shared.forget(*self._place(number))

    def close(self) -> None:
        """Let nobody else attach. Not collective. Callable twice."""
        if self._shared is not None:
            self._shared.close()

    @property
    def _proven(self) -> NDArray[np.int64]:
        assert self._shared is not None
        return np.frombuffer(self._shared.view[-_COUNT_BYTES:], np.int64)

    def _place(self, number: int) -> tuple[int, int]:
        """Return where a window lies in the memory of this host."""
        topology, window = self._comm.topology, self._windows[number]
        reader = self._readers[number]
        if topology.node_of[reader] == topology.node_of[self._comm.rank]:
            return self._slots.room(self._numbers[number], window)
        start, end = self._slots.room(0, window)
        return self._slots.nbytes + start, self._slots.nbytes + end

    def _attach(self, descriptor: int, token: bytes) -> None:
        leader = self._comm.visible.get(self._leader)
        if descriptor < 0 or leader is None:
            return
        shared = SharedMemory.attach(leader.process, descriptor, self._nbytes)
        if shared.view[self._end :][:_TOKEN_BYTES] == token:
            self._shared = shared
        else:
            shared.close()


def _numbers_in_queues(readers: Sequence[int]) -> list[int]:
    """Return the number of each window among those of its reader."""
    counts: dict[int, int] = {}
    numbers = []
    for reader in readers:
        numbers.append(counts.get(reader, 0))
        counts[reader] = numbers[-1] + 1
    return numbers
