# SPDX-License-Identifier: Apache-2.0
"""Takes the parts of states that differ between ranks on purpose, and hands them to root.

Root joins the small parts of a `PartsState`. Of a `RankedState` it learns the forms and
digests of all parts; their bytes come while root writes them.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, cycle, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm import agree, exchange_messages, gather_bytes, start_sending
from mpi_ckpt.engine.sync.captured import (
    CapturedState,
    about_leaf,
    capture_own_parts,
    digest_states,
)
from mpi_ckpt.errors import StageError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.digest import Digest, Digests
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, MemoryBuffer, copy_bytes
from mpi_ckpt.state import PartsState
from mpi_ckpt.states.unshared.ranked import RankedState

if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Collection,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from mpi4py import MPI
    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.state import State, Structure

    Message = tuple[int, NDArray[np.uint8]]


_HANDING_PARTS = "handing over the parts of ranks"
# Root receives and holds so many bytes at a time; a longer leaf is received alone.
_HELD_BYTES = 8 << 20


class ComingBytes:
    """The leaves of other ranks' parts, on root, which come as they are read.

    Not collective: the other ranks send them meanwhile. Main thread only. Each leaf is read
    once, those of a rank in the order in which they lie in a file; a leaf that is passed
    over, since an older generation holds it, is dropped.

    Args:
        comm: The communicator.
    """

    def __init__(self, comm: Communicator) -> None:
        self.rank = comm.rank
        self._comm = comm
        # Of each rank the next one is the last.
        self._waiting: dict[int, list[_ComingBuffer]] = {}
        self._digests: dict[str, Digests] = {}
        self._held: dict[_ComingBuffer, NDArray[np.uint8]] = {}

    def expect(self, rank: int, state: str, number: int, spec: LeafSpec) -> Leaf:
        """Return a leaf whose bytes will come.

        Args:
            rank: The rank that will send it.
            state: Name of its state.
            number: Its number among the leaves of all ranks.
            spec: Its form.
        """
        buffer = _ComingBuffer(self, rank, state, number, spec)
        self._waiting.setdefault(rank, []).append(buffer)
        return Leaf(spec, buffer)

    def begin(self, digests: Mapping[str, Digests]) -> None:
        """Put what is expected into the order in which it comes.

        Args:
            digests: Name of a state -> the digests of its leaves.
        """
        self._digests.update(digests)
        for messages in self._waiting.values():
            messages.sort(key=lambda one: _place(one.spec))
            messages.reverse()

    def take(self, buffer: _ComingBuffer) -> memoryview:
        """Return the bytes of a leaf.

        Raises:
            StageError: On the calling rank, if they are not those of its digest.
        """
        while buffer not in self._held:
            self._receive(buffer.rank)
        return self._held.pop(buffer).data

    def drain(self) -> None:
        """Receive what is still to come, and drop it. Callable twice."""
        self._held.clear()
        for messages in self._waiting.values():
            while messages:
                self._exchange([messages.pop()])
        self._waiting.clear()

    def _receive(self, wanted: int) -> None:
        """Receive the next leaf of a rank, and some more of the ranks that follow."""
        for one in [one for one in self._held if one.rank == wanted]:
            del self._held[one]  # passed over
        held = sum(map(len, self._held.values()))
        some: list[_ComingBuffer] = []
        # As they lie in the file: one of each rank, then the next of each.
        following = [rank for rank in self._waiting if rank > wanted]
        for rank in chain([wanted, *following], cycle(list(self._waiting))):
            messages = self._waiting.get(rank, [])
            nbytes = messages[-1].spec.nbytes if messages else 0
            if some and held + nbytes > _HELD_BYTES:
                break
            if messages:
                some.append(messages.pop())
                held += nbytes
            if not messages:
                self._waiting.pop(rank, None)
            if not self._waiting:
                break
        self._exchange(some, hold=True)

    def _exchange(self, some: Sequence[_ComingBuffer], *, hold: bool = False) -> None:
        rooms = [np.empty(one.spec.nbytes, np.uint8) for one in some]
        receives = [(one.rank, room) for one, room in zip(some, rooms, strict=True)]
        exchange_messages(self._comm, [], receives, _HANDING_PARTS)
        if not hold:
            return
        for one, room in zip(some, rooms, strict=True):
            # INVARIANT: no digest of other bytes than those written gets into a manifest.
            if Digest.of(room.data) != self._digests[one.state][one.number]:
                raise StageError(
                    f"state {one.state!r}, leaf {one.spec.name!r}: rank {one.rank} "
                    "sent other bytes than it had when the save began"
                )
            self._held[one] = room


class _ComingBuffer(MemoryBuffer):
    """Stands in for the bytes of a leaf that another rank will send."""

    # Root has one for each leaf of each rank.
    __slots__ = ("_coming", "number", "rank", "spec", "state")
    _memory = memoryview(b"")

    def __init__(
        self, coming: ComingBytes, rank: int, state: str, number: int, spec: LeafSpec
    ) -> None:
        self._coming, self.rank, self.state = coming, rank, state
        self.number, self.spec = number, spec

    def view(self) -> memoryview | None:
        return None

    def read(self) -> memoryview:
        return self._coming.take(self)

    def copy_to(self, target: memoryview) -> None:
        copy_bytes(self.read(), target)


class PartsInTransit:
    """The parts of states that keep them apart, on their way to root.

    Main thread only.

    Args:
        comm: The communicator.
        mine: This rank's parts, digested, in the order of the states.
        coming: The bytes of the other ranks' parts, on root.
        join: Returns the states with the parts of all ranks, on root; may fail.

    Attributes:
        captured: What ``join`` returned.
    """

    def __init__(
        self,
        comm: Communicator,
        mine: Sequence[CapturedState],
        coming: ComingBytes,
        join: Callable[[], list[CapturedState]],
    ) -> None:
        self._comm = comm
        self._mine = mine
        self._coming = coming
        self._join = join
        self._sends: list[Message] = []
        self._requests: list[MPI.Request] = []
        self._failure: BaseException | None = None
        self.captured: list[CapturedState] = []

    @classmethod
    def none(cls, comm: Communicator) -> PartsInTransit:
        """Return no parts. Not collective."""
        return cls(comm, (), ComingBytes(comm), list)

    def learn(self) -> None:
        """Put together what root knows of all parts.

        Not collective. Called once, within the next meeting.

        Raises:
            CheckpointError: On the calling rank, if parts do not belong together.
        """
        self.captured = self._join()
        self._join = list  # root needs the texts of all ranks no longer

    @property
    def are_here(self) -> bool:
        """Whether this rank has parts that it has not handed over."""
        return bool(self._mine)

    def _send(self) -> None:
        """Send this rank's parts, all but the last ones wholly; root sends nothing."""
        if self._comm.is_root:
            return
        mine, self._mine = self._mine, ()
        # The first leaf of a part is its structure, which root has already.
        leaves = [(one, leaf) for one in mine for leaf in one.leaves[1:]]
        leaves.sort(key=lambda pair: _place(pair[1].spec))
        sends: list[Message] = []
        for one, leaf in leaves:
            data = np.zeros(leaf.spec.nbytes, np.uint8)
            if self._failure is None:
                try:
                    with about_leaf(one, leaf):
                        data = np.frombuffer(leaf.buffer.read(), np.uint8)
                except BaseException as error:
                    self._failure = error
            sends.append((self._comm.root, data))
            if sum(len(data) for _, data in sends) > _HELD_BYTES:
                exchange_messages(self._comm, sends, [], _HANDING_PARTS)
                sends = []
        self._sends, self._requests = sends, start_sending(self._comm, sends)

    def _finish(self) -> None:
        """Wait until root has this rank's parts; receive on root what it has not read."""
        requests, self._requests = self._requests, []
        if requests:
            wait = self._comm.wait
            wait(requests, _HANDING_PARTS, streaming=True, buffers=self._sends)
        self._sends = []
        self._coming.drain()

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        """Hand this rank's parts over to root, which reads those of all in the block.

        Not collective: entered on every rank, at the same point of a save. Messages of this
        rank's own in the block come after it on root.

        Raises:
            StageError: On the calling rank, if a leaf cannot be read.
        """
        try:
            self._send()
            yield
        finally:
            self._finish()
        if self._failure is not None:
            raise self._failure

    def fetch(self, contents: Sequence[CapturedState | State]) -> dict[str, CapturedState]:
        """Hand this rank's parts over; return on root those of all, in private memory.

        Not collective: called on every rank.

        Args:
            contents: What root is going to write: of the parts only these are kept.

        Returns:
            The name of a state -> its parts; nothing on other ranks.

        Raises:
            StageError: On the calling rank, if a leaf cannot be read.
        """
        names = {one.name for one in self.captured}
        taken = [
            one for one in contents if isinstance(one, CapturedState) and one.name in names
        ]
        copies: dict[int, Leaf] = {}
        with self.handed_over():
            leaves = [leaf for one in taken for leaf in one.leaves]
            for leaf in sorted(leaves, key=lambda leaf: _place(leaf.spec)):
                copy = MemoryBuffer.empty(leaf.spec.nbytes)
                leaf.buffer.copy_to(copy.read())
                copies[id(leaf)] = Leaf(leaf.spec, copy)
        return {
            one.name: replace(one, leaves=tuple([copies[id(leaf)] for leaf in one.leaves]))
            for one in taken
        }


def _place(spec: LeafSpec) -> int:
    """Return the key by which leaves are sorted as in a file: wide elements first."""
    return -dtypes.element_bytes(spec.dtype)


_DOING = "collecting the parts of states"


@dataclass(frozen=True, slots=True)
class OwnParts:
    """This rank's parts of the states of a save, as they were at one moment.

    Attributes:
        joined: Those of states whose parts root joins, encoded.
        kept: Those of states that keep them apart: leaves, digested but not copied.
    """

    joined: bytes = b""
    kept: tuple[CapturedState, ...] = ()

    def encode(self) -> bytes:
        """Return what root must know of them. Not collective. Thread-safe."""
        heads = [
            [
                bytes(one.leaves[0].buffer.read()).decode(),
                [spec.to_json() for spec in one.specs],
                [[block.hex() for block in d.blocks] for d in one.digests or ()],
            ]
            for one in self.kept
        ]
        return json.dumps(heads).encode() + b"\n" + self.joined


def parts_apart(session: Session, states: Sequence[State]) -> frozenset[str]:
    """Return the names of the states whose parts a save leaves to the ranks to write.

    Not collective: the same on every rank. With one writer there are none, since the other
    ranks may not see its directory. A copy in memory must hold all parts, since a lost rank
    takes its own along: then root collects them as well.
    """
    if session.comm.size == 1 or session.memory is not None:
        return frozenset()
    if session.options.writers == "root":
        return frozenset()
    return frozenset(
        state.name for state in states if isinstance(state, RankedState) and state.is_large
    )


def take_parts(
    states: Sequence[State], apart: Collection[str] = (), *, threads: int
) -> OwnParts:
    """Return this rank's parts of the states that have parts, for `combine_parts`.

    Not collective. Must not communicate.

    Args:
        states: The states of a save.
        apart: Names of those whose parts root neither joins nor writes.
        threads: Threads that hash.

    Raises:
        StageError: On the calling rank, if a state cannot give its part.
    """
    parts = []
    for state in states:
        if isinstance(state, PartsState):
            with concerning(f"state {state.name!r}"):
                parts.append(state.part())
    # The lengths first, as a line of text.
    lengths = json.dumps([len(part) for part in parts]).encode()
    kept = capture_own_parts(
        (s for s in states if isinstance(s, RankedState) and s.name not in apart),
        cut=False,
    )
    return OwnParts(lengths + b"\n" + b"".join(parts), tuple(digest_states(kept, threads)))


def combine_parts(
    comm: Communicator,
    states: Sequence[State],
    mine: OwnParts | None,
    apart: Collection[str] = (),
    *,
    threads: int,
) -> PartsInTransit:
    """Let root join the parts of all ranks, or send it their forms.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.
        mine: Result of `take_parts` on this rank; None to take the parts now.
        apart: As for `take_parts`.
        threads: As for `take_parts`.

    Returns:
        The parts that are kept apart: root has to `learn` of them in the next meeting, and
        they are still to be handed over.

    Raises:
        StageError: On every rank, if any rank cannot give a part, or root cannot join the
            parts of a state.
    """
    joined = [state for state in states if isinstance(state, PartsState)]
    kept = [s for s in states if isinstance(s, RankedState) and s.name not in apart]
    if not joined and not kept:
        return PartsInTransit.none(comm)

    def take() -> OwnParts:
        return take_parts(states, apart, threads=threads)

    if mine is None:
        mine = agree(comm, _DOING, take, error=StageError)
    gathered = gather_bytes(comm, mine.encode(), _DOING)
    texts = [text.partition(b"\n") for text in gathered]
    if joined:
        _join(comm, joined, [body for _, _, body in texts])
    coming = ComingBytes(comm)

    def join() -> list[CapturedState]:
        of_all = [_PartsOfAll(coming, one) for one in mine.kept if comm.is_root]
        # One rank after the other: the objects of a text take more room than the text.
        for rank, (head, _, _) in enumerate(texts):
            for one, of_rank in zip(of_all, json.loads(head), strict=True):
                one.add(rank, *of_rank)
        captured = [one.captured() for one in of_all]
        coming.begin({one.name: one.digests for one in captured if one.digests is not None})
        return captured

    return PartsInTransit(comm, mine.kept, coming, join)


def capture_apart(states: Iterable[State], apart: Collection[str]) -> list[CapturedState]:
    """Capture this rank's parts of the states that `parts_apart` names, as cut leaves.

    Not collective. Errors are those of `take_parts`.
    """
    mine = [one for one in states if isinstance(one, RankedState) and one.name in apart]
    return capture_own_parts(mine, cut=True)


def receive_parts(
    comm: Communicator, parts: PartsInTransit | None, captured: list[CapturedState]
) -> list[CapturedState]:
    """Return the contents on root with the parts of all ranks in root's memory.

    Collective. Main thread only. On other ranks the contents stay as they are.

    Raises:
        StageError: On every rank, if any cannot hand over a part.
    """
    if parts is None or not parts.are_here:
        return captured
    arrived = agree(comm, _DOING, lambda: parts.fetch(captured), error=StageError)
    return [arrived.get(one.name, one) for one in captured]


def _join(
    comm: Communicator, states: Sequence[PartsState], encoded: Sequence[bytes]
) -> None:
    """Let root join the parts of states that do not keep them apart. Collective."""

    def combine() -> None:
        of_ranks = [_split(one) for one in encoded]
        for number, state in enumerate(states if comm.is_root else ()):
            with concerning(f"state {state.name!r}"):
                state.combine([parts[number] for parts in of_ranks])

    agree(comm, _DOING, combine, error=StageError)
    # INVARIANT: nothing is counted twice. From here on root keeps the joined parts, and
    # every rank forgets the part that it gave; before, a failure changes neither.
    for state in states:
        state.combined()


class _PartsOfAll:
    """The parts of all ranks of one state, as root learns of them."""

    def __init__(self, coming: ComingBytes, mine: CapturedState) -> None:
        assert isinstance(mine.state, RankedState)
        self._coming, self._mine, self._state = coming, mine, mine.state
        self._structures: list[Structure] = []
        self._alike: Structure = None  # what the first rank's must be like
        self._leaves: list[Leaf] = []
        self._digests: list[bytes] = []
        self._several: dict[int, Digest] = {}
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._text, self._text_buffer = "", MemoryBuffer(b"")

    def add(
        self, rank: int, text: str, specs: Sequence[Any], blocks: Sequence[Sequence[str]]
    ) -> None:
        """Add the part of the next rank."""
        structure = json.loads(text)
        alike = self._state.alike(structure)
        if not self._structures:
            self._alike = alike
        elif alike == self._alike:
            structure = self._structures[0]  # in memory once
        self._structures.append(structure)
        first = len(self._leaves)
        for at, one in enumerate(blocks):
            digest = Digest(tuple(map(bytes.fromhex, one)))
            self._digests.append(digest.whole)
            if len(one) != 1:
                self._several[first + at] = digest
        if rank == self._coming.rank:
            self._leaves += self._mine.leaves
            return
        named = map(self._spec, specs)
        if text != self._text:  # those of neighbouring ranks are often equal
            self._text, self._text_buffer = text, MemoryBuffer(text.encode())
        self._leaves.append(Leaf(next(named), self._text_buffer))
        for spec in named:
            number = len(self._leaves)
            self._leaves.append(self._coming.expect(rank, self._mine.name, number, spec))

    def captured(self) -> CapturedState:
        """Return the state with the parts of all ranks.

        Raises:
            CheckpointError: On the calling rank, if they do not belong together.
        """
        state = self._state
        with concerning(f"state {state.name!r}"):
            state.compare(self._structures)
        leaves = tuple(self._leaves)
        form = state.form_of(tuple([leaf.spec for leaf in leaves]))
        digests = Digests(b"".join(self._digests), self._several)
        return CapturedState(
            state, state.form(len(self._structures)), leaves, form, digests
        )

    def _spec(self, values: Sequence[Any]) -> LeafSpec:
        # Ranks have leaves of the same few types and shapes: each is in memory once.
        name, dtype, shape = values
        kept = self._shapes.setdefault(tuple(shape), tuple(shape))
        return LeafSpec(name, sys.intern(dtype), kept)


def _split(encoded: bytes) -> list[bytes]:
    head, _, body = encoded.partition(b"\n")
    ends = [0]
    for length in json.loads(head):
        ends.append(ends[-1] + length)
    return [body[start:end] for start, end in pairwise(ends)]
