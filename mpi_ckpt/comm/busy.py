# SPDX-License-Identifier: Apache-2.0
"""Makes ranks wait for others that have announced to be late, and why.

A busy rank makes no MPI calls, so it cannot answer. It therefore sends all other ranks one
short message before it begins and another at the end. They look for these messages when a
deadline has passed, and at each meeting, so that messages do not pile up.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import Patience, Tag, has_left, keep_forever
from mpi_ckpt.errors import OptionsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpi4py import MPI
    from numpy.typing import NDArray

    from mpi_ckpt.comm.communicator import Communicator

logger = logging.getLogger(__name__)

_REASON_BYTES = 240
_NUMBERS = 2
_LETTER_BYTES = 8 * _NUMBERS + _REASON_BYTES
# MPI: a message travels by itself once its request is done. The first message to a rank on
# another host waits for that rank to accept the connection, perhaps in vain.
_SENDING_SECONDS = 3.0
# How far ranks may be apart in time when they close a manager.
_SETTLING_SECONDS = 30.0


def in_words(seconds: float) -> str:
    """Return a time in words: in seconds, or in minutes from two minutes on. Pure."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


@dataclass(frozen=True, slots=True)
class Occupation:
    """The work that a busy rank has announced.

    Attributes:
        reason: The reason on one line; an empty one announces the end.
        since: When it began, by the wall clock of its host.
        at_most_seconds: After this time the other ranks ignore it.
    """

    reason: str
    since: float
    at_most_seconds: float

    @classmethod
    def begin(cls, reason: str, at_most_seconds: float) -> Occupation:
        """Return an occupation that begins now. Not collective. Thread-safe.

        Raises:
            OptionsError: On the calling rank, if an argument is invalid.
        """
        text = " ".join(str(reason).split())
        if not text:
            raise OptionsError(f"busy({reason!r}): the reason must be a few words")
        if not 0 < at_most_seconds < math.inf:
            raise OptionsError(
                f"busy({reason!r}): at_most_seconds is {at_most_seconds}: must be above 0 "
                "and finite, so that the others notice if this rank dies"
            )
        return cls(text, time.time(), at_most_seconds)

    def encode(self) -> NDArray[np.uint8]:
        """Return the occupation as bytes of a fixed length. Not collective."""
        numbers = np.array([self.since, self.at_most_seconds], np.float64).tobytes()
        reason = self.reason.encode(errors="replace")[:_REASON_BYTES]
        letter = bytearray(numbers + reason.ljust(_REASON_BYTES, b"\0"))
        return np.frombuffer(letter, np.uint8)

    @classmethod
    def decode(cls, encoded: bytes) -> Occupation:
        """Return the occupation that `encode` encoded. Not collective."""
        since, most = np.frombuffer(encoded[: 8 * _NUMBERS], np.float64).tolist()
        reason = encoded[8 * _NUMBERS :].rstrip(b"\0").decode(errors="replace")
        return cls(reason, since, most)


_ENDED = Occupation("", 0.0, 0.0)

# The occupations of this process, the innermost last. One list for all communicators: a
# busy rank is late for every manager that its peers wait in.
_OWN: list[Occupation] = []
_OPEN: weakref.WeakSet[BusyRanks] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class _Heard:
    """The announcement of another rank, with its beginning by this rank's own clock."""

    occupation: Occupation
    began: float

    @property
    def is_believed(self) -> bool:
        return time.monotonic() - self.began <= self.occupation.at_most_seconds


class BusyRanks:
    """The ranks of a communicator that have announced to be busy. Main thread only.

    Not collective.

    Args:
        comm: The communicator.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._heard: dict[int, _Heard] = {}
        self._listened = time.monotonic()
        self._sends: list[tuple[MPI.Request, object]] = []
        self._is_announced = False  # whether the others know that this rank is busy
        self._is_withdrawn = False
        self._has_warned_of_lateness = False
        self._announcements = 0  # how many announcements this rank has sent
        self._received = 0

    def open(self) -> None:
        """Announce to these ranks too, from now on, when this one is busy.

        Called on every rank of a manager.
        """
        _OPEN.add(self)

    @property
    def is_any(self) -> bool:
        """Whether any other rank was busy when this one last listened."""
        return bool(self._heard)

    @contextmanager
    def occupied(self, reason: str, at_most_seconds: float) -> Iterator[None]:
        """Announce to other ranks that this one is busy while the block runs.

        This informs the ranks of every open manager, since they may wait in any.

        Args:
            reason: Why it is busy.
            at_most_seconds: After this time the others no longer wait for it.

        Raises:
            OptionsError: On the calling rank, if an argument is invalid.
            CollectiveError: On the calling rank, in another thread or a forked process.
        """
        comm = self._comm
        comm.home.require("busy()", comm.rank)
        own = Occupation.begin(reason, at_most_seconds)
        _OWN.append(own)
        try:
            for channel in list(_OPEN):
                channel.announce(own)
            yield
        finally:
            _OWN[:] = [occupation for occupation in _OWN if occupation is not own]
            for channel in list(_OPEN):
                channel.announce(_OWN[-1] if _OWN else _ENDED)

    def announce(self, occupation: Occupation) -> None:
        """Announce to all others why this rank is busy. Returns within some seconds."""
        comm = self._comm
        if comm.size == 1 or not comm.is_open or not comm.can_meet():
            return
        self._is_announced = bool(occupation.reason)
        self._announcements += 1
        letter = occupation.encode()
        others = [rank for rank in range(comm.size) if rank != comm.rank]
        try:
            for rank in others:
                self._sends.append((comm.handle.Isend(letter, rank, Tag.BUSY), letter))
            patience = Patience(_SENDING_SECONDS)
            while self._is_sending() and not patience.is_over:
                patience.go_round()
        except load_mpi().Exception as error:
            # If MPI has failed, the next meeting will fail; this is only a notice.
            logger.info(
                "the other ranks cannot be notified that this rank is busy: %s", error
            )
            keep_forever(*self._sends)
            self._sends.clear()

    def listen(self) -> None:
        """Receive the announcements of other ranks."""
        mpi, handle, now = load_mpi(), self._comm.handle, time.monotonic()
        status, letter = mpi.Status(), np.zeros(_LETTER_BYTES, np.uint8)
        silent = 0
        while silent < 2:  # MPI: see `is_called`
            if not handle.Iprobe(mpi.ANY_SOURCE, Tag.BUSY, status):
                silent += 1
                continue
            rank = status.source
            handle.Recv(letter, rank, Tag.BUSY)
            self._received += 1
            said = Occupation.decode(letter.tobytes())
            if said.reason:
                # Clocks of two hosts may differ, but the message arrived after the last
                # time this rank listened.
                age = min(max(time.time() - said.since, 0.0), now - self._listened)
                known = self._heard.get(rank)
                is_new = known is None or known.occupation != said
                began = now - age if is_new or known is None else known.began
                self._heard[rank] = _Heard(said, began)
            else:
                self._heard.pop(rank, None)
        self._listened = now

    def excuse(self, patience: Patience, waited_seconds: float, doing: str) -> bool:
        """Extend a wait as long as a rank is busy; return whether it may go on.

        Args:
            patience: Patience of the wait; its time restarts now if a rank is busy.
            waited_seconds: How long this rank has waited.
            doing: What the ranks meet for.

        Returns:
            False if the time is over, or a busy rank has died.
        """
        self.listen()
        if waited_seconds > self._comm.deadline_seconds:
            self.withdraw()
        if any(self._has_died(rank) for rank in self._heard):
            return False
        if not any(announced.is_believed for announced in self._heard.values()):
            return not patience.is_over
        patience.renew()
        if (
            waited_seconds > self._comm.deadline_seconds
            and not self._has_warned_of_lateness
        ):
            self._has_warned_of_lateness = True
            self._warn_of_lateness(doing)
        return True

    def withdraw(self) -> None:
        """Withdraw this rank's announcement: it waits for other ranks itself."""
        if self._is_announced:
            self.announce(_ENDED)
            self._is_withdrawn = True

    def resume(self) -> None:
        """Repeat the withdrawn announcement, at the end of the wait."""
        self._has_warned_of_lateness = False
        if self._is_withdrawn:
            self._is_withdrawn = False
            if _OWN:
                self.announce(_OWN[-1])

    def describe(self) -> list[str]:
        """Return in words which ranks are busy, since when and why."""
        return [f"{self._name(rank)} {self.words_of(rank)}" for rank in sorted(self._heard)]

    def words_of(self, rank: int) -> str:
        """Return a rank's announcement in words; empty for none."""
        if rank not in self._heard:
            return ""
        announced = self._heard[rank]
        text = (
            f"has been busy for {in_words(time.monotonic() - announced.began)}: "
            f"{announced.occupation.reason}"
        )
        if announced.is_believed:
            return text
        return (
            f"{text} (it had said at most {in_words(announced.occupation.at_most_seconds)})"
        )

    def settle(self) -> bool:
        """Receive the messages in flight, before the communicator is freed.

        Collective, on the ranks of a manager. One allreduce of 8 bytes.

        Returns:
            Whether no message is left in flight. If one is, a rank has left without coming
            here, or comes much later: then the communicator must not be freed.
        """
        if self not in _OPEN or self._comm.size == 1:
            return True
        # MPI: a message that no rank receives before its communicator is freed may turn up
        # in the next one (Open MPI 5.0), which then loses its own messages.
        _OPEN.discard(self)
        try:
            if self._is_announced:
                self.announce(_ENDED)
            return self._receive_all()
        except load_mpi().Exception as error:
            logger.info("a communicator is not freed: %s", error)
            return False

    def _receive_all(self) -> bool:
        handle = self._comm.handle
        mine, total = np.array([self._announcements], np.int64), np.zeros(1, np.int64)
        request = handle.Iallreduce(mine, total)
        patience = Patience(min(_SETTLING_SECONDS, self._comm.deadline_seconds))
        while not request.Test():
            is_look = patience.go_round()
            if patience.is_over or (is_look and has_left(handle)):
                keep_forever(request, mine, total)
                return False
        while self._received < int(total[0]) - self._announcements or self._is_sending():
            self.listen()
            patience.go_round()
            if patience.is_over:
                return False
        return True

    def _is_sending(self) -> bool:
        self._sends = [sent for sent in self._sends if not sent[0].Test()]
        return bool(self._sends)

    def _has_died(self, rank: int) -> bool:
        seen = self._comm.visible.get(rank)
        return seen is not None and seen.is_gone

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._comm.hosts[rank]}"

    def _warn_of_lateness(self, doing: str) -> None:
        comm: Any = self._comm
        if comm.rank <= 1:
            logger.warning(
                "%s waits beyond the deadline of %g s, in %s (%s): %s",
                *(comm.name, comm.deadline_seconds, comm.call, doing),
                "; ".join(self.describe()),
            )
