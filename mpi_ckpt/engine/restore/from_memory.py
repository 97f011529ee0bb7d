# SPDX-License-Identifier: Apache-2.0
"""Restores a copy in memory, and gives a copy to ranks that hold none."""

from __future__ import annotations

import json
import logging
import mmap
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import agree, any_of, bcast_bytes
from mpi_ckpt.engine.save.copies import number_of
from mpi_ckpt.engine.sync.sending import send_leaves
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.leaves.leaf import Leaf, MemoryBuffer
from mpi_ckpt.memory import MemoryCopy, SharedMemory, round_up

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.comm import Communicator, Deferred
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.memory import Memory

logger = logging.getLogger(__name__)


_DOING = "lending a copy in memory"

# So much of a copy may lie elsewhere, and is sent.
_LOOSE_BYTES_MAX = 16 << 20
_NOTHING = "null"


@dataclass(frozen=True, slots=True)
class LentCopy:
    """Where root's copy lies in memory that other processes can map.

    Attributes:
        descriptor: Of the memory, in root's process.
        inode: A number that only this memory has.
        nbytes: Length of the memory.
        starts: Offset of each leaf; -1 for one that lies elsewhere.
        sizes: Length of each leaf.
        loose: The bytes of the leaves that lie elsewhere.
    """

    descriptor: int
    inode: int
    nbytes: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    loose: bytes

    @classmethod
    def offer(
        cls, comm: Communicator, memory: Memory | None, leaves: Sequence[memoryview]
    ) -> LentCopy | None:
        """Return root's offer, None if it makes none. Collective. Main thread only.

        Args:
            comm: The communicator.
            memory: The memory of this rank.
            leaves: The leaves of the copy; used on root only.
        """
        offer = None
        if comm.is_root and memory is not None and memory.arena.shared is not None:
            offer = cls._of(memory.arena.shared, leaves)
        words = _NOTHING.encode() if offer is None else offer.encode()
        return cls.decode(bcast_bytes(comm, words if comm.is_root else None, _DOING))

    @classmethod
    def _of(cls, shared: SharedMemory, leaves: Sequence[memoryview]) -> LentCopy | None:
        base, nbytes = _address(shared.view), shared.view.nbytes
        starts, loose = [], []
        for leaf in leaves:
            start = _address(leaf) - base if leaf.nbytes else 0
            if not 0 <= start <= nbytes - leaf.nbytes:
                start = -1
                loose.append(leaf)
            starts.append(start)
        if sum(leaf.nbytes for leaf in loose) > _LOOSE_BYTES_MAX:
            return None
        return cls(
            shared.descriptor,
            shared.inode,
            nbytes,
            tuple(starts),
            tuple(leaf.nbytes for leaf in leaves),
            b"".join(loose),
        )

    def encode(self) -> bytes:
        """Return the offer as bytes. Not collective."""
        head = [self.descriptor, self.inode, self.nbytes, self.starts, self.sizes]
        return json.dumps(head).encode() + b"\n" + self.loose

    @classmethod
    def decode(cls, data: bytes) -> LentCopy | None:
        """Return the offer that `encode` has encoded; None for none. Not collective."""
        head, _, loose = data.partition(b"\n")
        if (words := json.loads(head)) is None:
            return None
        descriptor, inode, nbytes, starts, sizes = words
        return cls(descriptor, inode, nbytes, tuple(starts), tuple(sizes), loose)

    def take(self, comm: Communicator) -> list[memoryview] | None:
        """Return the leaves, mapped; None if this rank cannot map them. Not collective.

        They stay as they are until root makes another copy. Each rank drops or replaces its
        own before it does; if root is lost, they stay.
        """
        owner = comm.visible.get(comm.root)
        if owner is None:
            return None
        try:
            shared = SharedMemory.attach(
                owner.process, self.descriptor, self.nbytes, mmap.ACCESS_COPY
            )
        except (OSError, ValueError):
            return None
        is_it = shared.inode == self.inode
        shared.close()
        return self._leaves(shared.view) if is_it else None

    def _leaves(self, memory: memoryview) -> list[memoryview]:
        loose, leaves = memoryview(bytearray(self.loose)), []
        for start, size in zip(self.starts, self.sizes, strict=True):
            if start < 0:
                leaves.append(loose[:size])
                loose = loose[size:]
            else:
                leaves.append(memory[start : start + size])
        return leaves


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


_COPYING = "bringing back a copy in memory"
_ALIGNMENT = 64


def transfer_copy(
    session: Session, found: OpenGeneration, match: StateMatch, deferred: Deferred
) -> None:
    """Restore a copy in memory: each rank its own, or root's if the rank has none.

    Collective. Main thread only. A rank that has none keeps what root sends as its copy, if
    all ranks hold one: it may soon be the only rank left.

    Args:
        session: The manager's.
        found: The copy of this rank, if it is of the same form as root's.
        match: The destinations, in the same order on every rank.
        deferred: Keeps failures to store bytes, for the next meeting.

    Raises:
        RestoreError: On every rank, if any rank cannot store bytes.
    """
    comm, copy = session.comm, found.copy
    sources = copied_leaves(copy, match)

    def put() -> None:
        for source, leaf in zip(sources, match.leaves, strict=copy is not None):
            if leaf is not None:
                leaf.buffer.write(source)

    agree(comm, _COPYING, put, error=RestoreError)
    (lacking,) = any_of(comm, _COPYING, copy is None)
    if not lacking:
        return
    origin = _origin_of_root(session)
    lent = LentCopy.offer(comm, session.memory, sources)
    received = None if copy is not None else _ReceivedCopy.of(session, found, match)
    is_mapped = received is not None and received.map(lent)
    (lacking,) = any_of(comm, _COPYING, copy is None and not is_mapped)
    if lacking:
        room = None
        if received is not None and not is_mapped:
            room = received.make_room()
        _send(session, sources, match, room or match.leaves, deferred)
    if received is not None:
        deferred.attempt(lambda: received.keep(origin))


def _send(
    session: Session,
    sources: Sequence[memoryview],
    match: StateMatch,
    leaves: Sequence[Leaf | None],
    deferred: Deferred,
) -> None:
    """Send root's copy into leaves of all other ranks."""
    # Root sends from the copy, since a leaf that root's program lacks is nowhere else.
    if session.comm.is_root:
        sent = [
            Leaf(spec, MemoryBuffer(source))
            for spec, source in zip(match.specs, sources, strict=True)
        ]
    else:
        sent = [
            leaf or Leaf(spec, MemoryBuffer.empty(spec.nbytes))
            for spec, leaf in zip(match.specs, leaves, strict=True)
        ]
    sizes = np.array([leaf.spec.nbytes for leaf in sent], np.int64)
    send_leaves(session.comm, sent, sizes, session.options.io.window_bytes, deferred)


def copied_leaves(copy: MemoryCopy | None, match: StateMatch) -> list[memoryview]:
    """Return the bytes of the matched leaves in a copy, if any. Not collective."""
    held: Mapping[str, Sequence[memoryview]] = {} if copy is None else copy.leaves
    return [data for matched in match.states for data in held.get(matched.saved.name, ())]


def _origin_of_root(session: Session) -> tuple[str, int, int] | None:
    """Return the point in the history of saves that root's copy comes from. Collective."""
    comm, memory = session.comm, session.memory
    if session.hosts is None or memory is None:
        return None
    mine = json.dumps(memory.origin).encode() if comm.is_root else None
    origin = json.loads(bcast_bytes(comm, mine, _COPYING))
    return None if origin is None else (origin[0], origin[1], origin[2])


class _ReceivedCopy:
    """A copy for a rank that is to hold one and holds none. Not collective.

    Args:
        session: The manager's.
        memory: Is to hold it.
        found: Root's copy.
        match: The destinations.
    """

    def __init__(
        self, session: Session, memory: Memory, found: OpenGeneration, match: StateMatch
    ) -> None:
        self._session = session
        self._memory = memory
        self._found = found
        self._match = match
        self._places: list[memoryview] | None = None

    @classmethod
    def of(
        cls, session: Session, found: OpenGeneration, match: StateMatch
    ) -> _ReceivedCopy | None:
        """Return one, if this rank is to hold a copy of all that root has."""
        memory, names = session.memory, {one.saved.name for one in match.states}
        is_whole = names == {state.name for state in found.outline.states}
        if memory is None or memory.holders != "all" or not is_whole:
            return None
        memory.copy = None  # but it may hold tiles of root's copy
        return cls(session, memory, found, match)

    def map(self, lent: LentCopy | None) -> bool:
        """Take the copy that root lends; return whether this rank can map it."""
        self._places = None if lent is None else lent.take(self._session.comm)
        return self._places is not None

    def make_room(self) -> list[Leaf] | None:
        """Return leaves to receive the copy; None if there is no memory."""
        specs = self._match.specs
        sizes = [round_up(spec.nbytes, _ALIGNMENT) for spec in specs]
        ends = list(accumulate(sizes))
        try:
            room = self._memory.arena.take(ends[-1] if ends else 0)
        except OSError as error:
            logger.warning(
                "%s: no memory for a copy of the states (%s); this rank holds none until "
                "the next save",
                self._session.comm.name,
                error,
            )
            return None
        self._places = [
            room[end - size : end - size + spec.nbytes]
            for spec, size, end in zip(specs, sizes, ends, strict=True)
        ]
        pairs = zip(specs, self._places, strict=True)
        return [Leaf(spec, MemoryBuffer(place)) for spec, place in pairs]

    def keep(self, origin: tuple[str, int, int] | None) -> None:
        """Put the bytes into their destinations, and hold them as the copy of this rank.

        Args:
            origin: The point in the history of saves that they come from.
        """
        if self._places is None:
            return  # received into their destinations
        for place, leaf in zip(self._places, self._match.leaves, strict=True):
            if leaf is not None:
                leaf.buffer.write(place)
        places = iter(self._places)
        held = {
            one.saved.name: [next(places) for _ in one.saved.specs]
            for one in self._match.states
        }
        outline = self._found.outline
        number = number_of(outline.copy)
        self._memory.copy = MemoryCopy(outline.step, self._found.text, held, number)
        self._memory.origin = origin
