# SPDX-License-Identifier: Apache-2.0
"""Gathers the parts of states that are split over the ranks; root joins them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING

from mpi_ckpt.comm import agree, gather_bytes
from mpi_ckpt.errors import StageError
from mpi_ckpt.failures import concerning
from mpi_ckpt.state import PartsState
from mpi_ckpt.states.unshared.ranked import RankedState

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.state import State

_DOING = "collecting the parts of states"


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


def take_parts(states: Sequence[State], apart: Collection[str] = ()) -> bytes:
    """Return this rank's parts of the states that have parts, for `combine_parts`.

    Not collective. Must not communicate.

    Args:
        states: The states of a save.
        apart: Names of those whose parts are not joined.

    Raises:
        StageError: On the calling rank, if a state cannot give its part.
    """
    parts = []
    for state in states:
        if isinstance(state, PartsState) and state.name not in apart:
            with concerning(f"state {state.name!r}"):
                parts.append(state.part())
    if not parts:
        return b""
    # The lengths first, as a line of text.
    return json.dumps([len(part) for part in parts]).encode() + b"\n" + b"".join(parts)


def combine_parts(
    comm: Communicator,
    states: Sequence[State],
    mine: bytes | None,
    apart: Collection[str] = (),
) -> None:
    """Send the parts of all ranks to root, which joins them.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.
        mine: Result of `take_parts` on this rank; None to take the parts now.
        apart: As for `take_parts`.

    Raises:
        StageError: On every rank, if any rank cannot give a part, or root cannot join the
            parts of a state.
    """
    parted = [
        state
        for state in states
        if isinstance(state, PartsState) and state.name not in apart
    ]
    if not parted:
        return
    if mine is None:
        mine = agree(comm, _DOING, lambda: take_parts(parted), error=StageError)
    gathered = gather_bytes(comm, mine, _DOING)

    def combine() -> None:
        of_ranks = [_split(text) for text in gathered]
        for number, state in enumerate(parted if comm.is_root else ()):
            with concerning(f"state {state.name!r}"):
                state.combine([parts[number] for parts in of_ranks])

    agree(comm, _DOING, combine, error=StageError)
    # INVARIANT: nothing is counted twice. From here on root keeps the joined parts, and
    # every rank forgets the part that it gave; before, a failure changes neither.
    for state in parted:
        state.combined()


def _split(encoded: bytes) -> list[bytes]:
    head, _, body = encoded.partition(b"\n")
    ends = [0]
    for length in json.loads(head):
        ends.append(ends[-1] + length)
    return [body[start:end] for start, end in pairwise(ends)]
