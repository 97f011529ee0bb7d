# SPDX-License-Identifier: Apache-2.0
"""Spreads the news which ranks are here, with few messages of each rank. Pure.

In a small job each rank sends its news to every other rank. In a large one it has
neighbours at distances 1, 2, 4 and so on, in both directions, and passes on what is new to
it: then no rank is more than half of log2 N messages away. A block of absent ranks, such as
a lost host or rack, does not cut such a ring: longer distances lead past it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS_BYTES = 16
NO_WORDS = bytes(WORDS_BYTES)
_NUMBER_BYTES = 8
_SMALL = 32


def is_passed_on(size: int) -> bool:
    """Whether ranks pass on news of others, since not every rank sends to every rank."""
    return size > _SMALL


def neighbours_of(rank: int, size: int) -> list[int]:
    """Return the ranks to which a rank sends its news, ascending."""
    if not is_passed_on(size):
        return [other for other in range(size) if other != rank]
    steps = [1 << power for power in range((size - 1).bit_length())]
    ring = {(rank + sign * step) % size for step in steps for sign in (1, -1)}
    return sorted(ring - {rank})


class RollCall:
    """What a rank knows of the ranks that are here. Not thread-safe.

    Args:
        rank: This rank, which is here.
        size: The number of ranks.
        words: 16 bytes that go with root's name, if this is root.
        leaver: A rank that is known to have left the job; None for none.
    """

    def __init__(
        self, rank: int, size: int, words: bytes = NO_WORDS, leaver: int | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self.leaver = leaver
        self.words_of_root = words if rank == 0 else NO_WORDS
        self.neighbours = neighbours_of(rank, size)
        # A bit for each rank.
        self._present = 1 << rank

    @property
    def nbytes(self) -> int:
        """Length of `encode` in bytes: a bit for each rank, and 24 bytes."""
        return WORDS_BYTES + _NUMBER_BYTES + (self.size + 7) // 8

    @property
    def is_complete(self) -> bool:
        """Whether all ranks are here."""
        return self._present == (1 << self.size) - 1

    @property
    def absent(self) -> list[int]:
        """The ranks of which nothing was heard, ascending."""
        bits = np.frombuffer(
            self._present.to_bytes((self.size + 7) // 8, "little"), np.uint8
        )
        present = np.unpackbits(bits, count=self.size, bitorder="little")
        absent: list[int] = np.flatnonzero(present == 0).tolist()
        return absent

    @property
    def first(self) -> int:
        """The lowest rank that is here."""
        return (self._present & -self._present).bit_length() - 1

    def is_present(self, rank: int) -> bool:
        """Whether a rank is known to be here."""
        return bool(self._present >> rank & 1)

    def encode(self) -> bytes:
        """Return what this rank knows as bytes of a length that depends on N alone."""
        leaver = -1 if self.leaver is None else self.leaver
        return (
            self.words_of_root
            + leaver.to_bytes(_NUMBER_BYTES, "little", signed=True)
            + self._present.to_bytes((self.size + 7) // 8, "little")
        )

    def merge(self, encoded: bytes) -> bool:
        """Add what another rank knows; return whether any of it is new."""
        words, rest = encoded[:WORDS_BYTES], encoded[WORDS_BYTES:]
        leaver = int.from_bytes(rest[:_NUMBER_BYTES], "little", signed=True)
        theirs = int.from_bytes(rest[_NUMBER_BYTES:], "little")
        news = bool(theirs & ~self._present)
        if theirs & ~self._present & 1:
            self.words_of_root = words
        if leaver >= 0 and self.leaver is None:
            self.leaver, news = leaver, True
        self._present |= theirs
        return news

    def to_inform(self) -> list[int]:
        """Return the absent ranks that this rank informs that it waits no longer.

        Those to which no present neighbour has sent anything: each is informed by one of
        the present ranks, in turn.
        """
        if not is_passed_on(self.size):
            return []
        unheard = [
            rank
            for rank in self.absent
            if not any(map(self.is_present, neighbours_of(rank, self.size)))
        ]
        before_this = (self._present & ((1 << self.rank) - 1)).bit_count()
        return unheard[before_this :: self._present.bit_count()]


def spread(
    call: RollCall,
    send: Callable[[list[int], bytes], None],
    receive: Callable[[], bytes | None],
    is_enough: Callable[[], bool],
    pause: Callable[[bool], bool],
) -> None:
    """Hear the news of others and pass it on, until there is enough or time is over.

    The first message to the neighbours was sent by the caller.

    Args:
        call: What this rank knows; grows.
        send: Sends bytes to some ranks.
        receive: Returns the bytes of the next message that has arrived; None if none has.
        is_enough: Whether nothing more is wanted.
        pause: Called when nothing has arrived, with whether there was news since the last
            pause; returns whether the time is over.
    """
    neighbours = call.neighbours if is_passed_on(call.size) else []
    has_news = False
    while True:
        while (heard := receive()) is not None:
            has_news = call.merge(heard) or has_news
        # All that has arrived goes on in one message, also if nothing more is wanted here.
        if has_news and neighbours:
            send(neighbours, call.encode())
        if is_enough() or pause(has_news):
            return
        has_news = False
