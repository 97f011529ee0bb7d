# SPDX-License-Identifier: Apache-2.0
"""Takes the parts of states that differ between ranks on purpose.

Root joins the small parts of a `PartsState`. Of a `RankedState` it learns the forms and
digests of all parts; their bytes come while root writes them (`coming`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mpi_ckpt.comm import agree, gather_bytes
from mpi_ckpt.engine.sync.captured import CapturedState, capture_own_parts, digest_states
from mpi_ckpt.engine.sync.coming import ComingBytes, PartsInTransit
from mpi_ckpt.errors import StageError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.digest import Digest, Digests
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, MemoryBuffer
from mpi_ckpt.state import PartsState
from mpi_ckpt.states.unshared.ranked import RankedState

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.state import State

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
        heads = [json.loads(head) for head, _, _ in texts]
        captured = []
        for number, one in enumerate(mine.kept if comm.is_root else ()):
            with concerning(f"state {one.name!r}"):
                of_state = [head[number] for head in heads]
                captured.append(_capture(coming, number, one, of_state))
        coming.begin()
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


def _capture(
    coming: ComingBytes,
    number: int,
    mine: CapturedState,
    heads: Sequence[tuple[str, list[list[object]], list[list[str]]]],
) -> CapturedState:
    """Return a state with the parts of all ranks. On root."""
    state = mine.state
    assert isinstance(state, RankedState)
    state.compare([json.loads(text) for text, _, _ in heads])
    leaves: list[Leaf] = []
    digests: list[Digest] = []
    for rank, (text, specs, blocks) in enumerate(heads):
        of_rank = [Digest(tuple(map(bytes.fromhex, one))) for one in blocks]
        digests += of_rank
        if rank == coming.rank:
            leaves += mine.leaves
            continue
        named = [LeafSpec.from_json(spec) for spec in specs]
        leaves.append(Leaf(named[0], MemoryBuffer(text.encode())))
        more = zip(named[1:], of_rank[1:], strict=True)
        for at, (spec, digest) in enumerate(more, start=1):
            leaves.append(coming.expect(rank, (number, at), mine.name, spec, digest))
    form = state.form_of(tuple([leaf.spec for leaf in leaves]))
    structure = state.form(len(heads))
    return CapturedState(state, structure, tuple(leaves), form, Digests.of(digests))


def _split(encoded: bytes) -> list[bytes]:
    head, _, body = encoded.partition(b"\n")
    ends = [0]
    for length in json.loads(head):
        ends.append(ends[-1] + length)
    return [body[start:end] for start, end in pairwise(ends)]
