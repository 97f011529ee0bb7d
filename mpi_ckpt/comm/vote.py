# SPDX-License-Identifier: Apache-2.0
"""Flags of all ranks, joined in one small message: at once, or while the caller goes on.

With them meet two digests. One is of what each rank is doing: ranks that call different
things are told so, where MPI would hang or crash. The other is of anything that should be
the same on all ranks: whether it is costs nothing more.

An error that every rank raises then is told in full by one of them and named by the others:
with a thousand ranks the same text would otherwise be printed a thousand times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from mpi_ckpt.comm.collectives import bcast_json, gather_bytes
from mpi_ckpt.comm.liveness import hold, let_go_of
from mpi_ckpt.digest import DIGEST_BYTES, digest_bytes
from mpi_ckpt.errors import CheckpointError, CollectiveError, Telling
from mpi_ckpt.failures import name_ranks

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_ckpt.comm.communicator import Communicator

UNTOUCHED = "published generations are untouched"

_NOTHING = bytes(DIGEST_BYTES)
# The message: the flags, then each digest and its complement. Half a digest tells the few
# things apart that ranks do, and leaves the message below the smallest `message_bytes`.
_DOING = slice(1, 3)
_ALIKE = slice(3, 3 + 2 * DIGEST_BYTES // 8)


class Joined(NamedTuple):
    """What a vote has come to, the same on every rank.

    Attributes:
        flags: Those that any rank has set.
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
        """Whether a vote is under way; the same on every rank. Not collective."""
        # A rank that was confused may have posted more votes than another: whatever was
        # posted before all heard of it counts for nothing.
        return self._request is not None and self._confusions == self._comm.confusions

    def post(self, flags: int, digest: bytes = _NOTHING) -> None:
        """Start a vote. No other may be under way.

        Collective. Returns at once.

        Args:
            flags: This rank's, as bits of a non-negative number below 2**64.
            digest: 16 bytes, to be compared with those of the others.
        """
        if self._request is not None:
            # Given up after a confusion, and perhaps still written to.
            self._mine, self._all = self._mine.copy(), self._all.copy()
        self._mine[0] = flags
        self._put(_ALIKE, digest)
        self._confusions = self._comm.confusions
        self._request = self._comm.start_all_reduce(self._mine, self._all, "bor")
        hold(self)

    def take(self) -> Joined:
        """Wait for the vote that is under way.

        Collective.

        Raises:
            CollectiveError: On every live rank, if one never arrives or meets for
                something else.
        """
        request, self._request = self._request, None
        assert request is not None
        let_go_of(self)
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
        # Joined bitwise, a bit in which two ranks differ is set in the complement too.
        words, complements = self._all[place].reshape(2, -1)
        return not (words & complements).any()

    def _refuse_confusion(self) -> None:
        comm, doing = self._comm, self._doing
        comm.confusions += 1
        texts = [one.decode() for one in gather_bytes(comm, doing.encode(), doing)]
        groups: dict[str, list[int]] = {}
        for rank, text in enumerate(texts):
            groups.setdefault(text, []).append(rank)
        lines = [f"{name_ranks(one, comm.hosts)}: {text}" for text, one in groups.items()]
        told = bcast_json(comm, lines, doing)
        error = CollectiveError(
            f"the ranks do different things; {UNTOUCHED}. Each collective call must "
            "be made by all ranks, in the same order:\n  " + "\n  ".join(told),
            problems=told,
        )
        raise told_by(comm, error)


Error = TypeVar("Error", bound=CheckpointError)


def told_by(comm: Communicator, error: Error, *tellers: int) -> Error:
    """Return an error that all ranks are about to raise, with who of them tells it.

    Not collective.

    Args:
        comm: The communicator.
        error: The same on every rank.
        tellers: The ranks that print it in full if nobody catches it; none for root.
    """
    by = tellers or (comm.root,)
    brief = f"{type(error).__name__}, as told by rank {by[0]}"
    error.telling = Telling(comm.name, "" if comm.rank in by else brief)
    return error
