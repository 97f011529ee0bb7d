# SPDX-License-Identifier: Apache-2.0
"""Sends each rank its own bytes, which root makes one after the other while it sends.

The first of 16 neighbouring ranks receives small bytes for all of them together, and passes
them on. Root has long ones for each rank alone, and tells it so in their place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.comm.agreement import agree
from mpi_ckpt.comm.rank_tree import (
    TOGETHER_BYTES,
    Parcel,
    RankBytes,
    Sends,
    receive,
    receive_apart,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mpi_ckpt.comm.communicator import Communicator
    from mpi_ckpt.errors import CheckpointError

_NEIGHBOURS = 16


def deal_out(
    comm: Communicator,
    dealt: Iterable[tuple[Sequence[int], bytes]],
    doing: str,
    *,
    error: type[CheckpointError],
    window_bytes: int,
) -> bytes:
    """Send each rank its own bytes from root, which makes them while it sends.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        dealt: Yields some ranks and the bytes for each of them; each rank at most once.
            Used on root; may fail at any time.
        doing: The work, for errors.
        error: Class for exceptions of ``dealt`` that this package does not define.
        window_bytes: Limit of the bytes in flight, unless one rank gets more.

    Returns:
        This rank's bytes; none if it had no turn.

    Raises:
        CheckpointError: On every rank, if ``dealt`` failed.
        CollectiveError: On every live rank, if one never arrives.
    """
    if comm.is_root:
        dealer = _Dealer(comm, doing, window_bytes)
        dealer.deal(iter(dealt))
        outcome = dealer.outcome
    else:
        mine = _take(comm, doing)

        def outcome() -> bytes:
            return mine

    return agree(comm, doing, outcome, error=error)


def _first_of(rank: int) -> int:
    """Return the rank that receives for a rank and its neighbours."""
    return rank - rank % _NEIGHBOURS


def _take(comm: Communicator, doing: str) -> bytes:
    """Receive this rank's bytes; pass on those of its neighbours."""
    first = _first_of(comm.rank)
    source = comm.root if first == comm.rank else first
    missing = 1
    if first == comm.rank:
        missing = min(_NEIGHBOURS, comm.size - comm.rank)
    mine, sends = b"", Sends(comm, doing)
    while missing:
        (encoded,) = receive(comm, [source], doing)
        entries = Parcel.decode(encoded).entries
        missing -= len(entries)
        for one in entries:
            if one.rank != comm.rank:
                sends.start(one.rank, Parcel((one,)).encode())
        for one in entries:
            if one.rank == comm.rank:
                mine = one.data or b""
                if one.data is None:  # root sends them next, and may wait until they came
                    (mine,) = receive_apart(comm, [one], [comm.root], doing)
    sends.wait()
    return mine


class _Dealer:
    """Root's side: whatever fails, every rank gets the bytes that it awaits."""

    def __init__(self, comm: Communicator, doing: str, window_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._waiting = dict.fromkeys(range(comm.size))
        self._together: dict[int, list[RankBytes]] = {}
        self._together_bytes = 0
        self._sends = Sends(comm, doing)
        self._root = comm.root
        self._failure: BaseException | None = None
        self._mine = b""

    def deal(self, dealt: Iterator[tuple[Sequence[int], bytes]]) -> None:
        """Send all dealt bytes, and none to the ranks that had no turn."""
        while (turn := self._next(dealt)) is not None:
            ranks, data = turn
            for rank in ranks:
                self._send(rank, data)
        for rank in list(self._waiting):
            self._send(rank, b"")
        self._sends.wait()

    def outcome(self) -> bytes:
        """Return root's own bytes, or raise the failure."""
        if self._failure is not None:
            raise self._failure
        return self._mine

    def _next(
        self, dealt: Iterator[tuple[Sequence[int], bytes]]
    ) -> tuple[Sequence[int], bytes] | None:
        try:
            return next(dealt, None)
        # Also KeyboardInterrupt and SystemExit: the other ranks must learn of them.
        except BaseException as caught:
            self._failure = caught
            return None

    def _send(self, rank: int, data: bytes) -> None:
        del self._waiting[rank]
        if rank == self._root:
            self._mine = data
            return
        # MPI: a posted message keeps its bytes in memory until it is sent, so root posts no
        # more than a window of them.
        if self._sends.nbytes + self._together_bytes + len(data) > self._window_bytes:
            for first in list(self._together):
                self._send_together(first)
            self._sends.wait()
        first, is_long = _first_of(rank), len(data) > TOGETHER_BYTES
        entry = RankBytes(rank, len(data), None if is_long else data)
        if first == self._root:
            self._sends.start(rank, Parcel((entry,)).encode())
        else:
            together = self._together.setdefault(first, [])
            together.append(entry)
            self._together_bytes += 0 if is_long else len(data)
            nbytes = sum(one.nbytes for one in together)
            is_last = not any(one in self._waiting for one in _neighbours(first))
            if is_last or nbytes > TOGETHER_BYTES:
                self._send_together(first)
        if is_long:
            self._sends.start(rank, data, apart=True)

    def _send_together(self, first: int) -> None:
        entries = tuple(self._together.pop(first))
        self._together_bytes -= sum(len(one.data or b"") for one in entries)
        self._sends.start(first, Parcel(entries).encode())


def _neighbours(first: int) -> range:
    return range(first, first + _NEIGHBOURS)
