# SPDX-License-Identifier: Apache-2.0
"""Host buffers of any size from one rank to all others, the way the hosts suggest.

On one host the library's broadcast, a few pieces at a time. Between hosts a chain: each
passes on what it has while more arrives, so no link carries a byte twice. The trees of
the libraries send all from the first host two or more times.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
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

# Larger messages overlap less and leave the caches.
_PIECE_BYTES = 8 << 20

# Messages posted and not yet finished: 2 to 4 times a loop of blocking broadcasts, and
# immune to a busy Horovod thread.
_IN_FLIGHT = 16

# A chain has so much coming and as much going, in two messages at least: enough for the
# round trip of any link. More is slower, as messages in flight share the link: the first
# is then whole, and can be passed on, hardly before the last.
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
        doing: What the ranks meet for, told when one does not come.
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
    piece_bytes = chain_piece_bytes(sum(lengths), len(comm.topology.nodes))
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


@dataclass(frozen=True, slots=True)
class _Route:
    """How each message goes through this rank.

    Attributes:
        among: Communicator it is broadcast on; None where there is nobody else.
        root: Rank there that broadcasts it.
        in_flight: Messages that may be coming, and going, at a time.
        before: Rank that it comes from first; None for none.
        after: Rank that it is passed on to; None for none.
    """

    among: MPI.Comm | None
    root: int
    in_flight: int
    before: int | None = None
    after: int | None = None


def _chain_route(comm: Communicator, source: int, in_flight: int) -> _Route:
    link = comm.topology.link(comm.rank, source)
    ranks = comm.topology.nodes[comm.topology.node_of[comm.rank]]
    among = comm.node if len(ranks) > 1 else None
    root = ranks.index(link.entry)
    return _Route(among, root, in_flight, link.before, link.after)


@dataclass(slots=True)
class _Message:
    """A message under way: its pieces, its memory, what is posted for it."""

    pieces: tuple[Piece, ...]
    packed: NDArray[np.uint8]
    requests: list[MPI.Request]


class _Flow:
    """Messages in their order: some coming in, some going on.

    All are waited for in that order, which is the order of every rank: so no two ranks
    wait for each other, and whichever is waited for, MPI moves the others as well.
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
        """Start one more message, after the oldest has made room for it."""
        if len(self._coming) == self._route.in_flight:
            self._pass_on()
        message = _Message(pieces, self._pack(pieces), [])
        self._coming.append(message)
        if self._route.before is None:
            self._pass_on()
        else:
            message.requests = [self._comm.irecv(message.packed, self._route.before)]

    def finish(self) -> None:
        """Wait until nothing is under way."""
        while self._coming:
            self._pass_on()
        self._retire(len(self._going))

    def _pass_on(self) -> None:
        route = self._route
        if len(self._going) == route.in_flight:
            # Not one by one: a wait costs, and half of them are still in flight.
            self._retire(route.in_flight // 2)
        message = self._coming[0]
        self._wait(message.requests)
        self._going.append(self._coming.popleft())
        message.requests = []
        # The network first: it is what the others wait for.
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
        # If it is given up, all that is under way is: none of it may be anybody's memory.
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
