# SPDX-License-Identifier: Apache-2.0
"""Sends each rank its own bytes, which root makes one after the other while it sends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.comm.agreement import agree
from mpi_ckpt.comm.rank_tree import Sends, receive

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mpi_ckpt.comm.communicator import Communicator
    from mpi_ckpt.errors import CheckpointError


def scatter_bytes(
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
        (mine,) = receive(comm, [comm.root], doing)

        def outcome() -> bytes:
            return mine

    return agree(comm, doing, outcome, error=error)


class _Dealer:
    """Root's side: whatever fails, every rank gets the bytes that it awaits."""

    def __init__(self, comm: Communicator, doing: str, window_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._waiting = dict.fromkeys(range(comm.size))
        self._sends = Sends(comm, doing)
        self._root = comm.root
        self._failure: BaseException | None = None
        self._mine = b""

    def deal(self, dealt: Iterator[tuple[Sequence[int], bytes]]) -> None:
        """Send all dealt bytes, and nothing to the ranks that had no turn."""
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
        if self._sends.nbytes + len(data) > self._window_bytes:
            self._sends.wait()
        self._sends.start(rank, data)
