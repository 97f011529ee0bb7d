# SPDX-License-Identifier: Apache-2.0
"""Shares out the reads of a restore over ranks, and in time. Pure.

A *window* is a run of bytes of a file that a rank reads at a time. In a *turn* each reader
reads at most one window, and sends what others need of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Gaps between pieces up to this size are read rather than skipped.
_GAP_BYTES = 1 << 20

# Shorter windows are not worth a read of their own.
_SHORT_BYTES = 1 << 20

# A reader holds so many windows: it reads the next ones while it sends one.
_WINDOWS_HELD = 4

# Windows of each reader, so that the share of each can come close to what it needs.
_WINDOWS_EACH = 16

# A reader may read this much more than its share of its own data, before others help.
_SLACK = 1.05


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that ranks need of windows, as columns, in the order of windows and ranks.

    Attributes:
        window: Number of the window.
        rank: A rank that needs something of it.
        nbytes: The bytes that it needs, counted twice if they go to two of its tiles.
    """

    window: NDArray[np.int64]
    rank: NDArray[np.int64]
    nbytes: NDArray[np.int64]

    @classmethod
    def count(
        cls, window: NDArray[np.int64], rank: NDArray[np.int64], nbytes: NDArray[np.int64]
    ) -> Needs:
        """Add up the bytes of fragments by window and rank. Not collective."""
        ranks = int(rank.max(initial=0)) + 1
        keys, places = np.unique(window * ranks + rank, return_inverse=True)
        sums = np.bincount(places, nbytes, len(keys)).astype(np.int64)
        return cls(keys // ranks, keys % ranks, sums)

    def by_window(self, windows: int) -> list[list[tuple[int, int]]]:
        """Return for each window its pairs of rank and bytes. Not collective."""
        needs: list[list[tuple[int, int]]] = [[] for _ in range(windows)]
        columns = (self.window.tolist(), self.rank.tolist(), self.nbytes.tolist())
        for window, rank, nbytes in zip(*columns, strict=True):
            needs[window].append((rank, nbytes))
        return needs


def cut_windows(
    file: NDArray[np.int64],
    start: NDArray[np.int64],
    end: NDArray[np.int64],
    *,
    readers: int,
    window_bytes: int,
) -> NDArray[np.int64]:
    """Group pieces into windows. Not collective. Thread-safe.

    Args:
        file: File of each piece; the pieces are in the order of files and positions.
        start: First byte of each.
        end: One past its last byte.
        readers: Number of ranks that share the reading.
        window_bytes: A window has at most a quarter of these, unless a single piece is
            longer.

    Returns:
        The first piece of each window.
    """
    share = int((end - start).sum()) // (_WINDOWS_EACH * readers)
    longest = min(window_bytes // _WINDOWS_HELD, max(_SHORT_BYTES, share))
    apart = (np.diff(file) != 0) | (start[1:] - end[:-1] > _GAP_BYTES)
    firsts = []
    # A window ends at a gap that is not worth reading, but not where another rank's data
    # begins: ranks may want the tiles of a file in alternation, and reads became short.
    first = 0
    for stop in [*(np.flatnonzero(apart) + 1).tolist(), len(start)]:
        while first < stop:
            firsts.append(first)
            most = start[first] + longest
            first += max(1, int(np.searchsorted(end[first:stop], most, side="right")))
    return np.array(firsts, np.int64)


def choose_readers(
    file: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    needs: Needs,
    readers: Sequence[int],
    holders: Sequence[Sequence[int]] | None = None,
) -> NDArray[np.int64]:
    """Choose the rank that reads each window. Not collective. Thread-safe.

    If each file has what exactly one reader needs, and each reader needs one file, every
    rank reads its own, however long: that is a restart as many ranks with the same
    decomposition. Otherwise a window goes to the rank that needs most of it, among those
    that have not read more than their share; and if there is none, to the rank that reads
    least.

    Args:
        file: File of each window.
        nbytes: Its length.
        needs: What ranks need of the windows.
        readers: The ranks that may read.
        holders: For each file those of them that have it; None: all have all files.

    Returns:
        The reader of each window.
    """
    having = [readers if holders is None else holders[number] for number in file.tolist()]
    # Even where shares are uneven: a restart as before then needs no message at all.
    own = _owners_of_files(file, needs, readers)
    if own is not None:
        pairs = zip(own[file].tolist(), having, strict=True)
        if all(rank in ranks for rank, ranks in pairs):
            return own[file]
    lengths = nbytes.tolist()
    fair = _SLACK * sum(lengths) / len(readers)
    loads = dict.fromkeys(sorted(readers), 0)
    chosen: list[int | None] = []
    windows = zip(lengths, needs.by_window(len(lengths)), having, strict=True)
    for length, of_window, ranks in windows:
        near = [
            (-needed, loads[rank], rank)
            for rank, needed in of_window
            if rank in loads
            and (holders is None or rank in ranks)
            and (not loads[rank] or loads[rank] + length / 2 <= fair)
        ]
        chosen.append(min(near)[2] if near else None)
        if near:
            loads[min(near)[2]] += length
    # Given away at the end: at once they would take the share of ranks whose own data
    # comes later.
    for window, reader in enumerate(chosen):
        if reader is None:
            few = loads if holders is None else sorted(having[window])
            lightest = min(few, key=loads.__getitem__)
            chosen[window] = lightest
            loads[lightest] += lengths[window]
    return np.array(chosen, np.int64)


def _owners_of_files(
    file: NDArray[np.int64], needs: Needs, readers: Sequence[int]
) -> NDArray[np.int64] | None:
    """Return the only reader that needs each file, None if that is not one to one."""
    pairs = np.unique(np.column_stack((file[needs.window], needs.rank)), axis=0)
    files, ranks = pairs[:, 0], pairs[:, 1]
    is_one_to_one = len(set(files.tolist())) == len(set(ranks.tolist())) == len(pairs)
    if not is_one_to_one or not set(ranks.tolist()) <= set(readers):
        return None
    owners = np.full(int(files.max(initial=-1)) + 1, -1, np.int64)
    owners[files] = ranks
    return owners


def order_turns(
    reader: NDArray[np.int64], needs: Needs, window_bytes: int
) -> NDArray[np.int64]:
    """Choose the turn of each window.

    Not collective. Thread-safe. A reader reads its windows in their order. A turn ends
    early for windows that would overfill a receiver: otherwise all readers could send to
    one rank at once, and its memory had no limit.

    Args:
        reader: Reader of each window.
        needs: What ranks need of the windows.
        window_bytes: A receiver gets at most half of these from others in a turn, unless
            a single window has more for it.

    Returns:
        The turn of each window, from 0; no turn is without a window.
    """
    most = window_bytes // 2
    readers = reader.tolist()
    messages = [
        [(rank, nbytes) for rank, nbytes in of_window if rank != readers[window]]
        for window, of_window in enumerate(needs.by_window(len(readers)))
    ]
    waiting: dict[int, deque[int]] = {}
    for window, rank in enumerate(readers):
        waiting.setdefault(rank, deque()).append(window)
    turns = [0] * len(readers)
    turn = 0
    while waiting:
        incoming: dict[int, int] = {}
        # The first to choose finds every receiver free, so that each turn takes a window.
        # Readers with most windows left decide how long all take, and choose first.
        for rank in sorted(waiting, key=lambda r: (-len(waiting[r]), r)):
            sent = messages[waiting[rank][0]]
            if all(r not in incoming or incoming[r] + n <= most for r, n in sent):
                turns[waiting[rank].popleft()] = turn
                for receiver, nbytes in sent:
                    incoming[receiver] = incoming.get(receiver, 0) + nbytes
        waiting = {rank: left for rank, left in waiting.items() if left}
        turn += 1
    return np.array(turns, np.int64)
