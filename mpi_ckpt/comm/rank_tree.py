# SPDX-License-Identifier: Apache-2.0
"""Gathers and deals out bytes of all ranks along a binomial tree with rank 0 at its top.

No rank sends or receives more than some messages for each doubling of the ranks: small
bytes of neighbouring ranks travel together, up to 64 KiB. What is longer goes between its
rank and root directly, and a note in its place goes along the tree. So a rank between holds
no more than 64 KiB for each of its children, whatever the ranks have to say. Rank 0 is root
but in a broadcast for Horovod, whose root may be any rank: then one more message is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import UNDER_WAY, Tag
from mpi_ckpt.comm.roster import Findings, branch_of, children_of, parent_of
from mpi_ckpt.comm.topology import plan_messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mpi4py import MPI
    from numpy.typing import NDArray

    from mpi_ckpt.comm.communicator import Communicator

TOGETHER_BYTES = 64 << 10
"""The most that a message along the tree holds."""

_TOP = 0
_NUMBERS = 2  # of an entry
_LENGTH_BYTES = 8


class RankBytes(NamedTuple):
    """The bytes of one rank in a parcel; None if they come apart."""

    rank: int
    nbytes: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Parcel:
    """What ranks say, on its way through the tree. Pure.

    Attributes:
        entries: In the order of the ranks.
    """

    entries: tuple[RankBytes, ...]

    @classmethod
    def of(cls, rank: int, data: bytes, behind: Iterable[Parcel] = ()) -> Parcel:
        """Return the parcel of one rank, and behind it those of other ranks."""
        more = [entry for parcel in behind for entry in parcel.entries]
        return cls((RankBytes(rank, len(data), data), *more))

    def note(self) -> Parcel:
        """Return the note that a whole parcel comes apart, from its first rank."""
        return Parcel((RankBytes(self.entries[0].rank, self.nbytes, None),))

    def within(self, ranks: range) -> Parcel:
        """Return the entries of some ranks."""
        return Parcel(tuple([entry for entry in self.entries if entry.rank in ranks]))

    @property
    def nbytes(self) -> int:
        """Length of `encode`."""
        bodies = sum(entry.nbytes for entry in self.entries if entry.data is not None)
        return 8 * (1 + _NUMBERS * len(self.entries)) + bodies

    def encode(self) -> bytes:
        """Return the parcel as bytes."""
        heads = [len(self.entries)]
        for rank, nbytes, data in self.entries:
            heads += rank, ~nbytes if data is None else nbytes
        bodies = [data for _, _, data in self.entries if data is not None]
        return b"".join([np.array(heads, np.int64).tobytes(), *bodies])

    @classmethod
    def decode(cls, encoded: bytes) -> Parcel:
        """Return the parcel that `encode` encoded."""
        count = int(np.frombuffer(encoded, np.int64, 1)[0])
        heads = np.frombuffer(encoded, np.int64, _NUMBERS * count, 8).tolist()
        entries, at = [], 8 * (1 + len(heads))
        for rank, nbytes in zip(heads[::2], heads[1::2], strict=True):
            if nbytes < 0:
                entries.append(RankBytes(rank, ~nbytes, None))
            else:
                entries.append(RankBytes(rank, nbytes, encoded[at : at + nbytes]))
                at += nbytes
        return cls(tuple(entries))


class _Arriving:
    """Bytes of a length that this rank does not know; `Communicator.wait` takes it.

    Their number is at their beginning, in the first message.
    """

    def __init__(self, comm: Communicator, source: int) -> None:
        self._comm, self._source = comm, source
        self._status = load_mpi().Status()
        self._first = self._rest = np.empty(0, np.uint8)
        self._requests: list[MPI.Request] = []
        self.data = b""

    def Test(self) -> bool:
        comm, mpi = self._comm, load_mpi()
        if not self._requests:
            if not comm.handle.Iprobe(self._source, Tag.TREE, self._status):
                return False
            self._first = np.empty(self._status.Get_count(mpi.BYTE), np.uint8)
            self._requests = _start_receiving(comm, self._first, self._source)
        if not all(request.Test() for request in self._requests):
            return False
        length = int(self._first[:_LENGTH_BYTES].view(np.int64)[0])
        if missing := length - len(self._first) - len(self._rest):
            self._rest = np.empty(missing, np.uint8)
            self._requests = _start_receiving(comm, self._rest, self._source)
            return False
        self.data = self._first[_LENGTH_BYTES:].tobytes() + self._rest.tobytes()
        return True


def _start_receiving(
    comm: Communicator, room: NDArray[np.uint8], source: int
) -> list[MPI.Request]:
    cuts = plan_messages([len(room)], comm.message_bytes)
    return [comm.handle.Irecv(room[p.start : p.end], source, Tag.TREE) for (p,) in cuts]


def receive(comm: Communicator, sources: Sequence[int], doing: str) -> list[bytes]:
    """Wait for the next bytes that each of some ranks sends along the tree.

    Not collective. Main thread only.
    """
    arriving: Any = [_Arriving(comm, source) for source in sources]
    if arriving:
        comm.wait(arriving, doing)
    return [one.data for one in arriving]


def receive_apart(
    comm: Communicator, entries: Sequence[RankBytes], sources: Sequence[int], doing: str
) -> list[bytes]:
    """Receive what entries announce. Not collective. Main thread only."""
    rooms = [np.empty(entry.nbytes, np.uint8) for entry in entries]
    requests = [
        request
        for room, source in zip(rooms, sources, strict=True)
        for request in _start_receiving(comm, room, source)
    ]
    comm.wait(requests, doing, streaming=True, buffers=rooms)
    return [room.tobytes() for room in rooms]


class Sends:
    """Messages along the tree, and those that go apart, on their way.

    Not collective. Main thread only.
    """

    def __init__(self, comm: Communicator, doing: str) -> None:
        self._comm, self._doing = comm, doing
        self._requests: list[MPI.Request] = []
        self.nbytes = 0

    def start(self, to: int, data: bytes, *, apart: bool = False) -> None:
        """Start to send bytes; those that go apart have a length that is known there."""
        head = b"" if apart else np.int64(_LENGTH_BYTES + len(data)).tobytes()
        whole = np.frombuffer(head + data, np.uint8)
        # MPI: a posted message keeps its bytes in memory until it is sent; also if this
        # rank fails before it waits for that.
        UNDER_WAY.add(self)
        self.nbytes += len(whole)
        self._requests += [
            self._comm.handle.Isend(whole[piece.start : piece.end], to, Tag.TREE)
            for (piece,) in plan_messages([len(whole)], self._comm.message_bytes)
        ]

    def wait(self) -> None:
        """Wait until all are sent."""
        requests, self._requests, self.nbytes = self._requests, [], 0
        UNDER_WAY.discard(self)
        if requests:
            self._comm.wait(requests, self._doing, streaming=True)


def gather_bytes(comm: Communicator, data: bytes, doing: str) -> list[bytes]:
    """Collect bytes of any length from all ranks on root.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        data: This rank's bytes.
        doing: What the ranks meet for, for the error if one never arrives.

    Returns:
        Bytes of each rank in rank order on root; an empty list elsewhere.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    arrived = receive(comm, children_of(comm.rank, comm.size), doing)
    mine = Parcel.of(comm.rank, data, map(Parcel.decode, arrived))
    parent = parent_of(comm.rank)
    if parent is None:
        return _move(comm, _open_all(comm, mine, doing), _TOP, comm.root, doing)
    sends = Sends(comm, doing)
    if mine.nbytes <= TOGETHER_BYTES:
        sends.start(parent, mine.encode())
    else:
        sends.start(parent, mine.note().encode())
        sends.start(_TOP, mine.encode(), apart=True)
    sends.wait()
    return _move(comm, (), _TOP, comm.root, doing)


def _move(
    comm: Communicator, parts: Sequence[bytes], source: int, target: int, doing: str
) -> list[bytes]:
    """Give bytes of one rank to another, which returns them; others return none."""
    if source != target and comm.rank == source:
        entries = [RankBytes(at, len(part), part) for at, part in enumerate(parts)]
        sends = Sends(comm, doing)
        sends.start(target, Parcel(tuple(entries)).encode())
        sends.wait()
    elif source != target and comm.rank == target:
        (encoded,) = receive(comm, [source], doing)
        parts = [entry.data or b"" for entry in Parcel.decode(encoded).entries]
    return list(parts) if comm.rank == target else []


def _open_all(comm: Communicator, parcel: Parcel, doing: str) -> list[bytes]:
    """Return the bytes of all ranks, once those that come apart are here. On rank 0."""
    found: dict[int, bytes] = {}
    entries: Sequence[RankBytes] = parcel.entries
    while entries:
        found |= {rank: data for rank, _, data in entries if data is not None}
        apart = [entry for entry in entries if entry.data is None]
        sources = [entry.rank for entry in apart]
        encoded = receive_apart(comm, apart, sources, doing) if apart else ()
        entries = [entry for one in encoded for entry in Parcel.decode(one).entries]
    return [found[rank] for rank in range(comm.size)]


def scatter_bytes(
    comm: Communicator, parts: Sequence[bytes], doing: str, *, window_bytes: int
) -> bytes:
    """Send each rank its own part, where root has all of them.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        parts: A part for each rank, in rank order, on root; ignored elsewhere.
        doing: What the ranks meet for, for the error if one never arrives.
        window_bytes: Limit of the bytes in flight on root, unless one rank gets more.

    Returns:
        This rank's part.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    parts = _move(comm, parts, comm.root, _TOP, doing)
    parent = parent_of(comm.rank)
    if parent is None:
        _Division(comm, parts).send_all(doing, window_bytes)
        return parts[0]
    (encoded,) = receive(comm, [parent], doing)
    parcel = Parcel.decode(encoded)
    if parcel.entries[0].data is None:
        (encoded,) = receive_apart(comm, parcel.entries, [_TOP], doing)
        parcel = Parcel.decode(encoded)
    sends = Sends(comm, doing)
    for child in children_of(comm.rank, comm.size):
        sends.start(child, parcel.within(branch_of(child, comm.size)).encode())
    sends.wait()
    mine = parcel.entries[0].data
    assert mine is not None
    return mine


class _Division:
    """The parts of all ranks, divided into parcels. On rank 0."""

    def __init__(self, comm: Communicator, parts: Sequence[bytes]) -> None:
        self._comm, self._parts = comm, parts
        self._ends = np.cumsum([0, *map(len, parts)])

    def send_all(self, doing: str, window_bytes: int) -> None:
        """Send each child its parcel, and other ranks what comes to them apart."""
        sends = Sends(self._comm, doing)
        for child in children_of(0, self._comm.size):
            sends.start(child, self._for(child).encode())
        # Lower ranks first: a rank waits for its parent, and then for rank 0.
        for rank in self._apart(0):
            if sends.nbytes + self._nbytes_of(rank) > window_bytes:
                sends.wait()
            sends.start(rank, self._of(rank).encode(), apart=True)
        sends.wait()

    def _apart(self, rank: int) -> Iterator[int]:
        """Yield the ranks below a rank to which rank 0 sends a parcel, ascending."""
        for child in children_of(rank, self._comm.size):
            if not self._is_together(child):
                yield child
                yield from self._apart(child)

    def _is_together(self, rank: int) -> bool:
        return self._nbytes(branch_of(rank, self._comm.size)) <= TOGETHER_BYTES

    def _for(self, rank: int) -> Parcel:
        """Return what a rank gets along the tree."""
        if not self._is_together(rank):
            return Parcel((RankBytes(rank, self._nbytes_of(rank), None),))
        branch = branch_of(rank, self._comm.size)
        of_each = [RankBytes(n, len(self._parts[n]), self._parts[n]) for n in branch]
        return Parcel(tuple(of_each))

    def _of(self, rank: int) -> Parcel:
        """Return what a rank needs for itself and its children."""
        children = map(self._for, children_of(rank, self._comm.size))
        return Parcel.of(rank, self._parts[rank], children)

    def _nbytes_of(self, rank: int) -> int:
        """Return the length of `_of`, encoded."""
        total = self._nbytes([rank])
        for child in children_of(rank, self._comm.size):
            branch = branch_of(child, self._comm.size)
            is_together = self._is_together(child)
            total += self._nbytes(branch) - 8 if is_together else 8 * _NUMBERS
        return total

    def _nbytes(self, ranks: Sequence[int]) -> int:
        """Return the length of a parcel of neighbouring ranks."""
        bodies = int(self._ends[ranks[-1] + 1] - self._ends[ranks[0]])
        return 8 * (1 + _NUMBERS * len(ranks)) + bodies


def gather_findings(
    comm: Communicator, key: bytes, text: str, doing: str
) -> list[tuple[str, list[int]]]:
    """Collect on root what the ranks find, with the ranks that find the same.

    Collective. Main thread only. No rank holds more than a few of the texts.

    Args:
        comm: The communicator.
        key: The same for the same finding; empty if this rank finds nothing.
        text: This rank's finding; root gets that of the lowest rank with the key.
        doing: What the ranks meet for, for the error if one never arrives.

    Returns:
        On root the findings and their ranks, in the order of the lowest ranks; those after
        the first 17 have no text. An empty list elsewhere.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    mine = Findings.own(key.hex(), text)
    for child in children_of(comm.rank, comm.size):
        (encoded,) = receive(comm, [child], doing)
        mine = Findings.join([mine, Findings.decode(encoded)])
    parent = parent_of(comm.rank)
    if parent is not None:
        sends = Sends(comm, doing)
        sends.start(parent, mine.encode())
        sends.wait()
    found = _move(comm, [mine.encode()], _TOP, comm.root, doing)
    return Findings.decode(found[0]).by_text() if found else []
