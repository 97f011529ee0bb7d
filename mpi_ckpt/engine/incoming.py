# SPDX-License-Identifier: Apache-2.0
"""States that are about to be restored: where their bytes go, and the taking over."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import agree
from mpi_ckpt.engine.description import title_of
from mpi_ckpt.engine.read_plan import Place
from mpi_ckpt.engine.targets import NoBuffer
from mpi_ckpt.errors import RestoreError, StateMismatchError
from mpi_ckpt.leaf import Leaf, LeafSpec, MemoryBuffer
from mpi_ckpt.state import Arrival, LeafState, State
from mpi_ckpt.states.ranked import RankedState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator

__all__ = ["OVERWRITTEN", "Incoming", "adopt", "match"]

OVERWRITTEN = (
    "published generations are untouched, but states in memory may hold a mixture: do "
    "not train on them"
)

_NOTHING_YET = Arrival((), adopt=lambda: None)


@dataclass(frozen=True, slots=True)
class Incoming:
    """A state that is about to be restored.

    Attributes:
        state: The program's state.
        structure: What was saved beside the leaves; None for a stream.
        leaves: Where the leaves go; for a stream, one leaf of bytes.
        places: Where they come from.
        arrival: How the state takes them over.
    """

    state: State
    structure: Any
    leaves: tuple[Leaf, ...]
    places: tuple[Place, ...]
    arrival: Arrival


def match(
    description: dict[str, Any], states: Sequence[State], *, strict: bool
) -> list[Incoming]:
    """Find a place for every byte before the first one moves.

    Not collective. Called on every rank.

    Args:
        description: Of the generation, or of the copy, made on root.
        states: The states to restore; all are in the description.
        strict: Whether a leaf that only one side has is a mismatch.

    Raises:
        StateMismatchError: On the calling rank, listing all mismatches of all states.
    """
    matched: list[Incoming] = []
    problems: list[str] = []
    for state in states:
        try:
            matched.append(_match_one(description["states"][state.name], state, strict))
        except StateMismatchError as error:
            problems += error.problems or [str(error)]
    if problems:
        raise StateMismatchError(
            f"{title_of(description)} does not fit the program, nothing "
            "was changed:\n  " + "\n  ".join(problems),
            generation=description["generation"],
            problems=problems,
        )
    return matched


def _match_one(saved: dict[str, Any], state: State, strict: bool) -> Incoming:
    places = tuple(Place(*place) for place in saved["places"])
    if isinstance(state, RankedState) and "parts" in saved:
        # Its parts are dealt out: what this rank gets is not known yet.
        state.check(saved["structure"], saved["parts"])
        return Incoming(state, saved["structure"], (), (), _NOTHING_YET)
    if "leaves" not in saved:
        if isinstance(state, LeafState):
            raise StateMismatchError(f"state {state.name!r} was saved as a stream")
        spec = LeafSpec("stream", "U8", (places[0].nbytes,))
        leaf = Leaf(spec, MemoryBuffer.empty(spec.nbytes))
        load = Arrival((leaf,), lambda: state.load(io.BytesIO(leaf.buffer.read())))
        return Incoming(state, None, (leaf,), places, load)
    if not isinstance(state, LeafState):
        raise StateMismatchError(f"state {state.name!r} was saved as leaves")
    specs = [LeafSpec.from_json(one) for one in saved["leaves"]]
    structure = saved["structure"]
    arrival = state.prepare(structure, specs, strict=strict)
    leaves = tuple(
        leaf or Leaf(spec, NoBuffer())
        for spec, leaf in zip(specs, arrival.leaves, strict=True)
    )
    return Incoming(state, structure, leaves, places, arrival)


def adopt(comm: Communicator, incoming: Sequence[Incoming]) -> None:
    """Let the states take over what has arrived, in order.

    Collective. Main thread only.

    Raises:
        CheckpointError: On every rank, if a state's load fails on any.
    """

    def take_over() -> None:
        for one in incoming:
            one.arrival.adopt()

    agree(comm, "loading the states", take_over, error=RestoreError, safe=OVERWRITTEN)
