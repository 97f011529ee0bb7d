# SPDX-License-Identifier: Apache-2.0
"""Makes ranks wait for others that have announced to be late, and why.

A busy rank makes no MPI calls, so it cannot answer. It therefore sends a short letter
before it begins and another at the end: to all other ranks, or in a large job to its
neighbours (`gossip`), which pass on what is new to them. Ranks look for letters at each
meeting, so that they do not pile up, and while they wait.
"""

from __future__ import annotations

import logging
import math
import struct
import time
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpi_ckpt.comm.gossip import is_passed_on, neighbours_of
from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import Patience, Tag, has_left, keep_forever
from mpi_ckpt.errors import OptionsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mpi4py import MPI
    from numpy.typing import NDArray

    from mpi_ckpt.comm.communicator import Communicator

logger = logging.getLogger(__name__)

# A letter: the time by the wall clock of its sender; then of each announcement its rank,
# its number, how long ago the work began and how long it may take, and the reason.
_SENT = struct.Struct("d")
_ANNOUNCEMENT = struct.Struct("qqdd240s")
# A rank keeps in mind so many busy ranks: it waits as long as any of them is busy.
_KNOWN_MAX = 64
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
        began: When it began, by the clock of this process.
        at_most_seconds: After this time the other ranks ignore it.
    """

    reason: str
    began: float
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
        return cls(text, time.monotonic(), at_most_seconds)

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self.began

    @property
    def is_believed(self) -> bool:
        """Whether it has lasted no longer than announced."""
        return self.seconds <= self.at_most_seconds


_ENDED = Occupation("", 0.0, 0.0)


class Announcement(NamedTuple):
    """What a rank has announced; of two of its announcements the later has more."""

    rank: int
    number: int
    occupation: Occupation


def encode_letter(announcements: Iterable[Announcement]) -> NDArray[np.uint8]:
    """Return announcements as the bytes of a letter. Not collective."""
    letter = bytearray(_SENT.pack(time.time()))
    for rank, number, said in announcements:
        reason = said.reason.encode(errors="replace")
        numbers = rank, number, said.seconds, said.at_most_seconds
        letter += _ANNOUNCEMENT.pack(*numbers, reason)
    return np.frombuffer(letter, np.uint8)


def decode_letter(letter: bytes, on_its_way_max: float) -> Iterator[Announcement]:
    """Yield the announcements that `encode_letter` encoded. Not collective.

    Args:
        letter: The bytes.
        on_its_way_max: The most seconds that the letter was on its way.
    """
    (sent,) = _SENT.unpack_from(letter)
    # Clocks of two hosts may differ.
    on_its_way = min(max(time.time() - sent, 0.0), on_its_way_max)
    now = time.monotonic()
    for fields in _ANNOUNCEMENT.iter_unpack(letter[_SENT.size :]):
        rank, number, seconds, most, encoded = fields
        reason = encoded.rstrip(b"\0").decode(errors="replace")
        began = now - seconds - on_its_way
        yield Announcement(rank, number, Occupation(reason, began, most))


# The occupations of this process, the innermost last. One list for all communicators: a
# busy rank is late for every manager that its peers wait in.
_OWN: list[Occupation] = []
_OPEN: weakref.WeakSet[BusyRanks] = weakref.WeakSet()


class BusyRanks:
    """The ranks of a communicator that have announced to be busy. Main thread only.

    Not collective.

    Args:
        comm: The communicator.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._heard: dict[int, Announcement] = {}
        self._numbers = np.zeros(comm.size, np.int32)  # of each rank's last announcement
        self._neighbours = frozenset(neighbours_of(comm.rank, comm.size))
        self._listened = time.monotonic()
        self._sends: list[tuple[MPI.Request, object]] = []
        self._is_announced = False  # whether the others know that this rank is busy
        self._is_withdrawn = False
        self._is_settling = False
        self._settled: set[int] = set()
        self._has_warned_of_lateness = False
        self._letters = 0  # how many this rank has sent

    def open(self) -> None:
        """Announce to these ranks too, from now on, when this one is busy.

        Called on every rank of a manager.
        """
        _OPEN.add(self)

    def look(self) -> bool:
        """Return whether any other rank is busy. In a large job, pass on what is new."""
        if is_passed_on(self._comm.size):
            self.listen()
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
        """Announce to the others why this rank is busy. Returns within some seconds."""
        comm = self._comm
        if comm.size == 1 or not comm.is_open or not comm.can_meet():
            return
        self._is_announced = bool(occupation.reason)
        self._numbers[comm.rank] += 1
        number = int(self._numbers[comm.rank])
        try:
            self._send([Announcement(comm.rank, number, occupation)])
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
        """Receive the announcements of other ranks; pass on what is new."""
        mpi, handle = load_mpi(), self._comm.handle
        status, silent = mpi.Status(), 0
        known, news = set(self._heard), {}
        while silent < 2:  # MPI: see `is_called`
            if not handle.Iprobe(mpi.ANY_SOURCE, Tag.BUSY, status):
                silent += 1
                continue
            letter = np.empty(status.Get_count(mpi.BYTE), np.uint8)
            handle.Recv(letter, status.source, Tag.BUSY)
            if len(letter) == _SENT.size:
                self._settled.add(status.source)
            # It arrived after the last time that this rank listened.
            on_its_way_max = time.monotonic() - self._listened
            for said in decode_letter(letter.tobytes(), on_its_way_max):
                if self._note(said):
                    news[said.rank] = said
        self._listened = time.monotonic()
        # Who has not heard of the beginning need not hear of the end.
        news = {r: n for r, n in news.items() if n.occupation.reason or r in known}
        if news and is_passed_on(self._comm.size) and not self._is_settling:
            self._is_sending()  # so that sent letters do not pile up
            # Also what is not new: a neighbour may have had no room for it before.
            self._send((self._heard | news).values())

    def _note(self, said: Announcement) -> bool:
        """Keep an announcement in mind; return whether it is new."""
        rank, number, occupation = said
        if rank == self._comm.rank or number <= self._numbers[rank]:
            return False
        is_known = rank in self._heard
        if occupation.reason:
            is_full = len(self._heard) >= _KNOWN_MAX
            if is_full and not is_known and rank not in self._neighbours:
                return False
            self._heard[rank] = said
        else:
            self._heard.pop(rank, None)
        self._numbers[rank] = number
        return is_known or bool(occupation.reason)

    def _send(self, announcements: Iterable[Announcement]) -> None:
        letter = encode_letter(announcements)
        for rank in self._neighbours:
            self._sends.append((self._comm.handle.Isend(letter, rank, Tag.BUSY), letter))
        self._letters += 1

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
        if not any(said.occupation.is_believed for said in self._heard.values()):
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
        said = self._heard[rank].occupation
        text = f"has been busy for {in_words(said.seconds)}: {said.reason}"
        if said.is_believed:
            return text
        return f"{text} (it had said at most {in_words(said.at_most_seconds)})"

    def settle(self) -> bool:
        """Receive the messages in flight, before the communicator is freed.

        Collective, on the ranks of a manager. One allreduce of 8 bytes; and an empty letter
        to each neighbour, the last, if any rank has ever sent one.

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
            self._is_settling = True
            return self._receive_all()
        except load_mpi().Exception as error:
            logger.info("a communicator is not freed: %s", error)
            return False

    def _receive_all(self) -> bool:
        handle = self._comm.handle
        mine, total = np.array([self._letters], np.int64), np.zeros(1, np.int64)
        request = handle.Iallreduce(mine, total)
        patience = Patience(min(_SETTLING_SECONDS, self._comm.deadline_seconds))
        while not request.Test():
            is_look = patience.go_round()
            if patience.is_over or (is_look and has_left(handle)):
                keep_forever(request, mine, total)
                return False
        if not total[0]:
            return True
        self._send([])
        # MPI: messages of a rank come in the order in which it has sent them.
        while not self._settled.issuperset(self._neighbours) or self._is_sending():
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
