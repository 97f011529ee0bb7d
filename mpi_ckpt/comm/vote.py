# SPDX-License-Identifier: Apache-2.0
"""Joins flags of all ranks in one small message, at once or while the caller goes on.

The message also carries two digests. One is of the call that each rank is in: ranks in
different calls get an error, where MPI would hang or crash. The other is of any value that
should be equal on all ranks: comparing it costs nothing more.

If every rank raises an error, one rank prints it in full and the others only name it:
otherwise a thousand ranks would print the same text a thousand times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from mpi_ckpt.comm.collectives import bcast_json, gather_bytes
from mpi_ckpt.comm.liveness import keep_until_release, release
from mpi_ckpt.errors import CheckpointError, CollectiveError, Printing
from mpi_ckpt.failures import name_ranks
from mpi_ckpt.leaves.digest import DIGEST_BYTES, digest_bytes

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_ckpt.comm.communicator import Communicator

UNTOUCHED = "published generations are untouched"

_NOTHING = bytes(DIGEST_BYTES)
# The message: the flags, then each digest and its complement. Half a digest distinguishes
# the few calls of ranks, and keeps the message below the smallest `message_bytes`.
_DOING = slice(1, 3)
_ALIKE = slice(3, 3 + 2 * DIGEST_BYTES // 8)


class Joined(NamedTuple):
    """The outcome of a vote, the same on every rank.

    Attributes:
        flags: The flags that any rank has set.
        is_alike: Whether all ranks gave the same digest.
    """

    flags: int
    is_alike: bool


class Vote:
    """Joins flags over all ranks, again and again, one vote at a time.

    Main thread only. A message is 56 bytes, whatever the flags: ranks that do different
    things must still meet in messages of one length.

    Args:
        comm: The communicator.
        doing: What the ranks meet for; the same on every rank.
    """

    def __init__(self, comm: Communicator, doing: str) -> None:
        self._comm = comm
        self._doing = doing
        self._mine = np.zeros(_ALIKE.stop, np.uint64)
        self._put(_DOING, digest_bytes(doing.encode())[:8])
        self._all = np.empty_like(self._mine)
        self._request: MPI.Request | None = None
        self._confusions = 0

    @property
    def is_posted(self) -> bool:
        """Whether a vote is posted; the same on every rank. Not collective."""
        # A confused rank may have posted more votes than another: votes posted before all
        # ranks learned of the confusion do not count.
        return self._request is not None and self._confusions == self._comm.confusions

    def post(self, flags: int, digest: bytes = _NOTHING) -> None:
        """Start a vote. No other vote may be posted.

        Collective. Returns at once.

        Args:
            flags: This rank's flags, as bits of a non-negative number below 2**64.
            digest: 16 bytes, which the ranks compare.
        """
        if self._request is not None:
            # MPI may still write to arrays given up after a confusion.
            self._mine, self._all = self._mine.copy(), self._all.copy()
        self._mine[0] = flags
        self._put(_ALIKE, digest)
        self._confusions = self._comm.confusions
        self._request = self._comm.start_all_reduce(self._mine, self._all, "bor")
        keep_until_release(self)

    def take(self) -> Joined:
        """Wait for the posted vote.

        Collective.

        Raises:
            CollectiveError: On every live rank, if one never arrives or meets for
                something else.
        """
        request, self._request = self._request, None
        assert request is not None
        release(self)
        self._comm.wait([request], self._doing, buffers=(self._mine, self._all))
        if not self._is_alike(_DOING):
            self._refuse_confusion()
        self._comm.note_meeting(self._doing)
        return Joined(int(self._all[0]), self._is_alike(_ALIKE))

    def exchange(self, flags: int, digest: bytes = _NOTHING) -> Joined:
        """Vote and wait for the outcome.

        Collective. One allreduce of 56 bytes.

        Raises:
            CollectiveError: On every live rank, as `take` does.
        """
        self.post(flags, digest)
        return self.take()

    def _put(self, place: slice, digest: bytes) -> None:
        words = np.frombuffer(digest, np.uint64)
        self._mine[place] = np.concatenate([words, ~words])

    def _is_alike(self, place: slice) -> bool:
        # After a bitwise or, a bit that differs between ranks is set in the complement too.
        words, complements = self._all[place].reshape(2, -1)
        return not (words & complements).any()

    def _refuse_confusion(self) -> None:
        comm, doing = self._comm, self._doing
        comm.confusions += 1
        texts = [text.decode() for text in gather_bytes(comm, doing.encode(), doing)]
        groups: dict[str, list[int]] = {}
        for rank, text in enumerate(texts):
            groups.setdefault(text, []).append(rank)
        lines = [
            f"{name_ranks(ranks, comm.hosts)}: {text}" for text, ranks in groups.items()
        ]
        differing = bcast_json(comm, lines, doing)
        error = CollectiveError(
            f"the ranks do different things; {UNTOUCHED}. Each collective call must "
            "be made by all ranks, in the same order:\n  " + "\n  ".join(differing),
            problems=differing,
        )
        raise printed_by(comm, error)


Error = TypeVar("Error", bound=CheckpointError)


def printed_by(comm: Communicator, error: Error, *printers: int) -> Error:
    """Return an error that all ranks will raise, with the ranks that print it noted.

    Not collective.

    Args:
        comm: The communicator.
        error: The error, the same on every rank.
        printers: The ranks that print it in full if it is uncaught; none for root.
    """
    by = printers or (comm.root,)
    brief = f"{type(error).__name__}, reported in full by rank {by[0]}"
    error.printing = Printing(comm.name, "" if comm.rank in by else brief)
    return error
