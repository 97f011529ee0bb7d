# SPDX-License-Identifier: Apache-2.0
"""Shares the windows of a restore among the ranks of each host.

The rank that reads for a host puts each proven window into memory that the others of the
host can read: no message is needed on one host. The reads themselves go to private memory,
since shared memory has no huge pages, without which a direct read may take three times as
long (measured; benchmarks/README.md).

If all ranks are on one host, they count there which windows are there and which they have
stored, and need not meet for each: a meeting takes as long as four copies of a window
(measured, 4 ranks on 2 cores).
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import any_of, bcast_on_hosts, bcast_to_hosts
from mpi_ckpt.leaves.leaf import copy_bytes
from mpi_ckpt.memory import SharedMemory, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.storage.reading.read_plan import Window

_DOING = "sharing memory on each host"

# For fewer bytes it is not worth the agreement.
_LEAST_BYTES = 16 << 20

# The memory begins with the token, the number of windows that are there, and the number of
# windows that each rank of the host has stored.
_TOKEN_BYTES = 16
_COUNT_BYTES = 8

# While the ranks copy one window, the next one is put beside it.
_PLACES = 2

# A rank that waits for a window looks for it so often before it meets the others: waiting
# in MPI takes a core, which the rank that reads needs.
_LOOK_SECONDS = 5e-4
_LOOKS = 100

# Other processors may show a count before the bytes that it counts, unless ranks meet.
_IS_ORDERED = platform.machine() in ("x86_64", "AMD64")


class HostMemory:
    """Memory of each host for the windows that pass it.

    Collective, unless said otherwise. Main thread only.

    Args:
        comm: The communicator.
        windows: All windows of the restore.
        readers: The rank that reads each window; leaders of hosts only.
    """

    def __init__(
        self, comm: Communicator, windows: Sequence[Window], readers: Sequence[int]
    ) -> None:
        topology = comm.topology
        self._comm = comm
        self._windows = windows
        self._readers = readers
        self._leader = topology.leaders[topology.node_of[comm.rank]]
        self._place_bytes = max(window.end - window.start for window in windows)
        self._number_on_host = list(comm.ranks_on_host).index(comm.rank)
        counts = (1 + len(comm.ranks_on_host)) * _COUNT_BYTES
        self._head_bytes = round_up(_TOKEN_BYTES + counts, mmap.PAGESIZE)
        self._nbytes = self._head_bytes + _PLACES * self._place_bytes
        self._token = os.urandom(_TOKEN_BYTES)
        self._shared: SharedMemory | None = None
        self._head: SharedMemory | None = None  # writable on all ranks of the host
        if self._leader == comm.rank:
            with suppress(OSError, ValueError):
                self._shared = self._head = SharedMemory.create(self._nbytes)
                self._shared.view[:_TOKEN_BYTES] = self._token

    @classmethod
    def of(
        cls, comm: Communicator, windows: Sequence[Window], readers: Sequence[int]
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
        return cls(comm, windows, readers)

    @property
    def needs_no_meetings(self) -> bool:
        """Whether the counts alone tell all ranks when to go on. Not collective."""
        return self._comm.hosts.are_one and _IS_ORDERED

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
        (lacking,) = any_of(self._comm, _DOING, self._head is None)
        self.close()
        return not lacking

    def put(self, number: int, proven: memoryview) -> None:
        """Put a window there, and show the other ranks of this host that it is there.

        Not collective. All ranks of this host have stored the window before the last.

        Args:
            number: Number of the window among all; this rank has read it.
            proven: Its bytes.
        """
        copy_bytes(proven, self.window(number))
        self._announce(number)

    def has_place_for(self, number: int) -> bool:
        """Sleep until this host's ranks need the place of a window no more, but not long.

        Not collective. Returns whether they do not.
        """
        return self._await(lambda: bool((self._stored >= number - _PLACES + 1).all()))

    def look_for(self, number: int) -> bool:
        """Sleep until a window is announced on this host, but not for long.

        Not collective. Returns whether it is; else the ranks meet, and look again. What
        another host reads is never announced: it comes with `deliver`.
        """
        reader, topology = self._readers[number], self._comm.topology
        if topology.node_of[reader] != topology.node_of[self._comm.rank]:
            return False
        return self._await(lambda: bool(self._counts[0] > number))

    def window(self, number: int) -> memoryview:
        """Return the memory of a window on this host. Not collective."""
        assert self._shared is not None
        window = self._windows[number]
        start = self._head_bytes + number % _PLACES * self._place_bytes
        return self._shared.view[start : start + window.end - window.start]

    def note_stored(self, number: int) -> None:
        """Show that this rank needs a window no more. Not collective."""
        self._stored[self._number_on_host] = number + 1

    def _announce(self, number: int) -> None:
        self._counts[0] = number + 1

    def _await(self, is_so: Callable[[], bool]) -> bool:
        for _ in range(_LOOKS):
            if is_so():
                return True
            time.sleep(_LOOK_SECONDS)
        return False

    def deliver(self, number: int, doing: str) -> memoryview:
        """Bring a window to all hosts, once its reader has put it; return its bytes.

        The bytes stay until the window after the next one is put.

        Args:
            number: Number of the window among all.
            doing: What the ranks meet for, for the error if one never arrives.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        data = self.window(number)
        bcast_to_hosts(self._comm, data, doing, self._readers[number])
        return data

    def close(self) -> None:
        """Let nobody else attach. Not collective. Callable twice."""
        for memory in (self._shared, self._head):
            if memory is not None:
                memory.close()

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        assert self._head is not None
        head = self._head.view[_TOKEN_BYTES : self._head_bytes]
        return np.frombuffer(head, np.int64, 1 + len(self._comm.ranks_on_host))

    @cached_property
    def _stored(self) -> NDArray[np.int64]:
        return self._counts[1:]

    def _attach(self, descriptor: int, token: bytes) -> None:
        leader = self._comm.visible.get(self._leader)
        if descriptor < 0 or leader is None:
            return
        whose = leader.process, descriptor
        self._shared = SharedMemory.attach(*whose, self._nbytes)
        if self._shared.view[:_TOKEN_BYTES] == token:
            self._head = SharedMemory.attach(*whose, self._head_bytes, mmap.ACCESS_WRITE)
