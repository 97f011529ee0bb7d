# SPDX-License-Identifier: Apache-2.0
"""Broadcasts host buffers of any size, along a route that suits the hosts.

On one host it uses the library's broadcast, a few pieces at a time. Between hosts it uses a
chain: each host passes on bytes while more arrive, so no link carries a byte twice. The
broadcast trees of MPI libraries send all bytes from the first host two or more times.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm.topology import chain_piece_bytes, plan_messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI
    from numpy.typing import NDArray

    from mpi_ckpt.comm.communicator import Communicator
    from mpi_ckpt.comm.topology import Piece

# Larger messages overlap less and do not fit the caches.
_PIECE_BYTES = 8 << 20

# Messages posted and not yet finished: 2 to 4 times as fast as a loop of blocking
# broadcasts, and not slowed down by a busy Horovod thread.
_IN_FLIGHT = 16

# Each rank of a chain has this much arriving and as much leaving, in two messages at least:
# enough for the round trip of any link. More is slower, since messages in flight share the
# link: the first would be complete, and could be passed on, hardly before the last.
_CHAIN_IN_FLIGHT_BYTES = 4 << 20


def bcast_buffers(
    comm: Communicator,
    buffers: Sequence[memoryview],
    doing: str,
    source: int | None = None,
) -> None:
    """Broadcast buffers from one rank into those of the others, in place.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        buffers: C-contiguous bytes, writable off the source; the same number and lengths
            on every rank.
        doing: What the ranks meet for, for the error if one never arrives.
        source: Rank whose bytes are sent, the same on every rank; None for root.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    if comm.size == 1:
        return
    if source is None:
        source = comm.root
    arrays = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
    lengths = [len(array) for array in arrays]
    piece_bytes = chain_piece_bytes(sum(lengths), len(comm.topology.names))
    if piece_bytes is None:
        piece_bytes = min(_PIECE_BYTES, comm.message_bytes)
        route = _Route(comm.handle, source, _IN_FLIGHT)
    else:
        piece_bytes = min(piece_bytes, comm.message_bytes)
        in_flight = min(_IN_FLIGHT, max(2, _CHAIN_IN_FLIGHT_BYTES // piece_bytes))
        route = _chain_route(comm, source, in_flight)
    flow = _Flow(comm, route, arrays, doing, fill=comm.rank == source)
    for pieces in plan_messages(lengths, piece_bytes):
        flow.take(pieces)
    flow.finish()


def bcast_to_hosts(comm: Communicator, buffer: memoryview, doing: str, source: int) -> None:
    """Broadcast a buffer from one rank into that of one rank of each other host.

    Collective. Main thread only. When it returns, the buffer of this host's rank is filled.

    Args:
        comm: The communicator.
        buffer: C-contiguous bytes of the same length on every rank, used on the source and
            the leaders of the other hosts; writable on the latter.
        doing: What the ranks meet for, for the error if one never arrives.
        source: Rank whose bytes are sent, the same on every rank.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    topology = comm.topology
    if comm.hosts.are_one:
        return
    if comm.rank == topology.link(comm.rank, source).entry:
        piece_bytes = chain_piece_bytes(len(buffer), len(topology.names)) or _PIECE_BYTES
        piece_bytes = min(piece_bytes, comm.message_bytes)
        in_flight = min(_IN_FLIGHT, max(2, _CHAIN_IN_FLIGHT_BYTES // piece_bytes))
        route = replace(_chain_route(comm, source, in_flight), among=None)
        arrays = [np.frombuffer(buffer, np.uint8)]
        flow = _Flow(comm, route, arrays, doing, fill=comm.rank == source)
        for pieces in plan_messages([len(buffer)], piece_bytes):
            flow.take(pieces)
        flow.finish()
    is_home = topology.node_of[comm.rank] == topology.node_of[source]
    if not is_home and comm.node is not None and comm.node.size > 1:
        comm.wait([comm.node.Ibarrier()], doing, streaming=True)


def bcast_on_hosts(comm: Communicator, data: NDArray[np.uint8], doing: str) -> None:
    """Broadcast a message from the leader of each host to the other ranks of the host.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        data: The message on leaders; overwritten on the other ranks.
        doing: What the ranks meet for, for the error if one never arrives.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    among = comm.handle if comm.hosts.are_one else comm.node
    if among is not None and among.size > 1:
        comm.wait([among.Ibcast(data, root=0)], doing, buffers=data)


@dataclass(frozen=True, slots=True)
class _Route:
    """The route of each message through this rank.

    Attributes:
        among: Communicator that broadcasts it; None if there is no other rank.
        root: Rank in that communicator that broadcasts it.
        in_flight: Messages that may arrive, and leave, at a time.
        before: Rank that sends it to this one; None for none.
        after: Rank that it is passed on to; None for none.
    """

    among: MPI.Comm | None
    root: int
    in_flight: int
    before: int | None = None
    after: int | None = None


def _chain_route(comm: Communicator, source: int, in_flight: int) -> _Route:
    link = comm.topology.link(comm.rank, source)
    if comm.node is None or comm.node.size == 1:
        return _Route(None, 0, in_flight, link.before, link.after)
    among = comm.node
    root = comm.ranks_on_host.index(link.entry)
    return _Route(among, root, in_flight, link.before, link.after)


@dataclass(slots=True)
class _Message:
    """A message in flight: its pieces, its memory, its posted requests."""

    pieces: tuple[Piece, ...]
    packed: NDArray[np.uint8]
    requests: list[MPI.Request]


class _Flow:
    """Messages in their order: some arriving, some leaving.

    Every rank waits for them in that same order, so no two ranks wait for each other; while
    a rank waits for one message, MPI moves the others as well.
    """

    def __init__(
        self,
        comm: Communicator,
        route: _Route,
        arrays: Sequence[NDArray[np.uint8]],
        doing: str,
        *,
        fill: bool,
    ) -> None:
        self._comm = comm
        self._route = route
        self._arrays = arrays
        self._doing = doing
        self._fill = fill
        self._coming: deque[_Message] = deque()
        self._going: deque[_Message] = deque()

    def take(self, pieces: tuple[Piece, ...]) -> None:
        """Start another message, after the oldest has made room for it."""
        if len(self._coming) == self._route.in_flight:
            self._pass_on()
        message = _Message(pieces, self._pack(pieces), [])
        self._coming.append(message)
        if self._route.before is None:
            self._pass_on()
        else:
            message.requests = [self._comm.irecv(message.packed, self._route.before)]

    def finish(self) -> None:
        """Wait until no message is in flight."""
        while self._coming:
            self._pass_on()
        self._retire(len(self._going))

    def _pass_on(self) -> None:
        route = self._route
        if len(self._going) == route.in_flight:
            # Not one by one: each wait costs time, and half of them stay in flight.
            self._retire(route.in_flight // 2)
        message = self._coming[0]
        self._wait(message.requests)
        self._going.append(self._coming.popleft())
        message.requests = []
        # The network first: the other hosts wait for it.
        if route.after is not None:
            message.requests.append(self._comm.isend(message.packed, route.after))
        if route.among is not None:
            message.requests.append(route.among.Ibcast(message.packed, root=route.root))

    def _retire(self, count: int) -> None:
        oldest = list(islice(self._going, count))
        self._wait([request for message in oldest for request in message.requests])
        for message in oldest:
            self._going.popleft()
            if len(message.pieces) > 1 and not self._fill:
                self._unpack(message)

    def _wait(self, requests: list[MPI.Request]) -> None:
        # If one message is given up, all in flight are: their memory must not be reused.
        if requests:
            under_way = (self._coming, self._going)
            self._comm.wait(requests, self._doing, streaming=True, buffers=under_way)

    def _pack(self, pieces: tuple[Piece, ...]) -> NDArray[np.uint8]:
        if len(pieces) == 1:
            (piece,) = pieces
            return self._arrays[piece.buffer][piece.start : piece.end]
        bucket = np.empty(sum(piece.nbytes for piece in pieces), np.uint8)
        if self._fill:
            offset = 0
            for piece in pieces:
                bucket[offset : offset + piece.nbytes] = self._arrays[piece.buffer]
                offset += piece.nbytes
        return bucket

    def _unpack(self, message: _Message) -> None:
        offset = 0
        for piece in message.pieces:
            part = message.packed[offset : offset + piece.nbytes]
            self._arrays[piece.buffer][:] = part
            offset += piece.nbytes
