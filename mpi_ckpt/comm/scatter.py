# SPDX-License-Identifier: Apache-2.0
"""Sends each rank its own bytes from root, with memory that grows with N on root only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm.agreement import agree
from mpi_ckpt.comm.topology import plan_messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mpi4py import MPI

    from mpi_ckpt.comm.communicator import Communicator
    from mpi_ckpt.errors import CheckpointError

_NOTHING = np.empty(0, np.uint8)


def scatter_bytes(
    comm: Communicator,
    lengths: Sequence[int],
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
        lengths: Number of bytes for each rank, in rank order, on root; ignored elsewhere.
        dealt: Yields some ranks and the bytes for each of them, until every rank with a
            length above zero had its turn. Used on root; may fail at any time.
        doing: The work, for errors.
        error: Class for exceptions of ``dealt`` that this package does not define.
        window_bytes: Limit of the bytes in flight, unless one rank gets more.

    Returns:
        This rank's bytes.

    Raises:
        CheckpointError: On every rank, if ``dealt`` failed.
        CollectiveError: On every live rank, if one never arrives.
    """
    all_lengths = np.array(lengths if comm.is_root else (), np.int64)
    length = np.zeros(1, np.int64)
    comm.wait(
        [comm.handle.Iscatter(all_lengths, length, root=comm.root)],
        doing,
        buffers=(all_lengths, length),
    )
    if comm.is_root:
        dealer = _Dealer(comm, lengths, doing, window_bytes)
        dealer.deal(iter(dealt))
        outcome = dealer.outcome
    else:
        mine = np.empty(int(length[0]), np.uint8)
        cuts = plan_messages([len(mine)], comm.message_bytes)
        comm.wait([comm.irecv(mine[p.start : p.end], comm.root) for (p,) in cuts], doing)
        outcome = mine.tobytes
    return agree(comm, doing, outcome, error=error)


def scatter_parts(
    comm: Communicator,
    parts: Sequence[bytes],
    doing: str,
    *,
    error: type[CheckpointError],
    window_bytes: int,
) -> bytes:
    """Send each rank its own part, where root has all of them. See `scatter_bytes`.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        parts: A part for each rank, in rank order, on root; empty elsewhere.
        doing: As for `scatter_bytes`.
        error: As for `scatter_bytes`.
        window_bytes: As for `scatter_bytes`.

    Returns:
        This rank's part.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    return scatter_bytes(
        comm,
        [len(part) for part in parts],
        (([rank], part) for rank, part in enumerate(parts)),
        doing,
        error=error,
        window_bytes=window_bytes,
    )


class _Dealer:
    """Root's side: whatever fails, every rank gets the messages that it awaits."""

    def __init__(
        self, comm: Communicator, lengths: Sequence[int], doing: str, window_bytes: int
    ) -> None:
        self._comm = comm
        self._doing = doing
        self._window_bytes = window_bytes
        self._waiting = {r: n for r, n in enumerate(lengths) if n and r != comm.root}
        self._sends: list[MPI.Request] = []
        self._on_the_way = 0
        self._failure: BaseException | None = None
        self._mine = b""

    def deal(self, dealt: Iterator[tuple[Sequence[int], bytes]]) -> None:
        """Send all dealt bytes, and complete the messages that the others wait for."""
        while (turn := self._next(dealt)) is not None:
            ranks, data = turn
            for rank in ranks:
                self._send(rank, data)
        for rank, length in self._waiting.items():
            # MPI: a message may be shorter than the awaited one.
            cuts = plan_messages([length], self._comm.message_bytes)
            self._sends += [self._comm.isend(_NOTHING, rank) for _ in cuts]
        self._drain()

    def outcome(self) -> bytes:
        """Return root's own bytes, or raise the failure."""
        if self._failure is not None:
            raise self._failure
        if self._waiting:
            raise AssertionError(f"nothing was dealt to ranks {list(self._waiting)}")
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
        if rank == self._comm.root:
            self._mine = data
            return
        if self._sends and self._on_the_way + len(data) > self._window_bytes:
            self._drain()
        length = self._waiting.pop(rank, 0)
        assert len(data) == length, f"{len(data)} bytes for rank {rank}, not {length}"
        # MPI: a posted message keeps its bytes in memory until it is sent, so root posts no
        # more than a window of them.
        bytes_ = np.frombuffer(data, np.uint8)
        cuts = plan_messages([length], self._comm.message_bytes)
        self._sends += [self._comm.isend(bytes_[p.start : p.end], rank) for (p,) in cuts]
        self._on_the_way += length

    def _drain(self) -> None:
        self._comm.wait(self._sends, self._doing, streaming=True)
        self._sends, self._on_the_way = [], 0
