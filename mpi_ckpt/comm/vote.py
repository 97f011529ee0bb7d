# SPDX-License-Identifier: Apache-2.0
"""Flags of all ranks, joined in one small message: at once, or while the caller goes on.

With them meets a digest of what each rank is doing: ranks that call different things are
told so, where MPI would hang or crash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm.liveness import hold, let_go_of
from mpi_ckpt.comm.transfer import bcast_json, gather_bytes
from mpi_ckpt.digest import digest_bytes
from mpi_ckpt.errors import CollectiveError

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_ckpt.comm.communicator import Communicator

__all__ = ["UNTOUCHED", "Vote"]

UNTOUCHED = "published generations are untouched"

_PURPOSE_WORDS = 2


class Vote:
    """Joins flags over all ranks, again and again, one vote at a time.

    Main thread only. A message is 40 bytes, whatever the flags: ranks that do different
    things must still meet in messages of one length.

    Args:
        comm: The communicator.
        doing: What the ranks meet for; the same on every rank.
    """

    def __init__(self, comm: Communicator, doing: str) -> None:
        self._comm = comm
        self._doing = doing
        purpose = np.frombuffer(digest_bytes(doing.encode()), np.uint64)
        self._mine = np.concatenate([purpose, ~purpose, np.zeros(1, np.uint64)])
        self._all = np.empty_like(self._mine)
        self._request: MPI.Request | None = None
        self._confusions = 0

    @property
    def is_posted(self) -> bool:
        """Whether a vote is under way; the same on every rank. Not collective."""
        # A rank that was confused may have posted more votes than another: whatever was
        # posted before all heard of it counts for nothing.
        return self._request is not None and self._confusions == self._comm.confusions

    def post(self, flags: int) -> None:
        """Start a vote. No other may be under way.

        Collective. Returns at once.

        Args:
            flags: This rank's, as bits of a non-negative number below 2**64.
        """
        if self._request is not None:
            # Given up after a confusion, and perhaps still written to.
            self._mine, self._all = self._mine.copy(), self._all.copy()
        self._mine[-1] = flags
        self._confusions = self._comm.confusions
        self._request = self._comm.start_all_reduce(self._mine, self._all, "bor")
        hold(self)

    def take(self) -> int:
        """Wait for the vote that is under way.

        Collective.

        Returns:
            The flags that any rank has set, the same on every rank.

        Raises:
            CollectiveError: On every live rank, if one never arrives or meets for
                something else.
        """
        request, self._request = self._request, None
        assert request is not None
        let_go_of(self)
        self._comm.wait([request], self._doing, buffers=(self._mine, self._all))
        joined = self._all.tolist()
        # A bit of the purpose in which two ranks differ is set in its complement as well.
        if joined[0] & joined[2] or joined[1] & joined[3]:
            self._refuse_confusion()
        self._comm.note_meeting(self._doing)
        flags: int = joined[-1]
        return flags

    def exchange(self, flags: int) -> int:
        """Vote and wait for the outcome.

        Collective. One allreduce of 40 bytes.

        Raises:
            CollectiveError: On every live rank, as `take` does.
        """
        self.post(flags)
        return self.take()

    def _refuse_confusion(self) -> None:
        comm, doing = self._comm, self._doing
        comm.note_confusion()
        texts = [one.decode() for one in gather_bytes(comm, doing.encode(), doing)]
        lines = [f"rank {r} on {comm.hosts[r]}: {text}" for r, text in enumerate(texts)]
        told = bcast_json(comm, lines, doing)
        raise CollectiveError(
            f"the ranks do different things; {UNTOUCHED}. Each collective call must "
            "be made by all ranks, in the same order:\n  " + "\n  ".join(told),
            problems=told,
        )
