# SPDX-License-Identifier: Apache-2.0
"""Matches the program's states with the saved ones, before the first byte moves."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING

from mpi_ckpt.devices import following
from mpi_ckpt.engine.overlaps import Overlap, separate_overlaps
from mpi_ckpt.engine.registry import ADVICE, numbered_alike
from mpi_ckpt.errors import StateMismatchError, cut_lines
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, MemoryBuffer
from mpi_ckpt.state import Arrival, LeafState, State
from mpi_ckpt.states.unshared.ranked import RankedState
from mpi_ckpt.storage.format.manifest import Extents

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mpi_ckpt.engine.outline import Outline, StateOutline
    from mpi_ckpt.engine.restore.cut.wanted import LeafIndex

_TILES = attrgetter("tiles")

_PROBLEMS_MAX = 18
"""Of a list that advice follows."""

_HOW_TO_GO_ON = (
    "to go on, let the program have what was saved; Options(strict=False) leaves out what "
    "only one of them has; restore(only=[...]) takes some states; another directory starts "
    "anew"
)

OVERWRITTEN = (
    "published generations are untouched, but states in memory may hold a mixture: do "
    "not train on them"
)


@dataclass(frozen=True, slots=True)
class MatchedState:
    """A state of the program, its saved contents, and their destination."""

    state: State
    saved: StateOutline
    arrival: Arrival

    @property
    def whole(self) -> Sequence[Leaf | None]:
        """The destinations of the leaves that were saved whole."""
        leaves = self.arrival.leaves
        return leaves[: len(self.saved.specs)] if self.saved.cut else leaves

    def without(self, numbers: Collection[int]) -> MatchedState:
        """Return the state without some leaves that were saved whole. Not collective."""
        if not numbers:
            return self
        kept = [n for n in range(len(self.saved.specs)) if n not in numbers]
        saved = replace(
            self.saved,
            form=self.saved.form.pick(kept),
            extents=self.saved.extents and self.saved.extents.pick(kept),
            cut=(),
        )
        leaves = [self.arrival.leaves[n] for n in kept]
        return replace(self, saved=saved, arrival=replace(self.arrival, leaves=leaves))


@dataclass(frozen=True, slots=True)
class StateMatch:
    """All states to be restored.

    Attributes:
        states: In the program's order.
        missing: Names of states that only the program has.
        unexpected: Names of states that only the generation has.
    """

    states: tuple[MatchedState, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def specs(self) -> list[LeafSpec]:
        """The specs of the leaves that were saved whole, of all states in order."""
        return [spec for one in self.states for spec in one.saved.specs]

    @property
    def extents(self) -> Extents:
        """The position of each in the files; empty for a copy in memory."""
        found = [one.saved.extents for one in self.states if one.saved.extents]
        return Extents.chained(found)

    @property
    def leaves(self) -> list[Leaf | None]:
        """The destination of each; None for a leaf that the program lacks."""
        return [leaf for one in self.states for leaf in one.whole]

    @property
    def has_tiles(self) -> bool:
        """Whether any leaf was saved cut over the ranks, or is cut in the program."""
        return any(
            one.saved.cut or one.saved.are_parts_cut or _are_cut(one.whole)
            for one in self.states
        )

    @property
    def missing_leaves(self) -> Mapping[str, tuple[str, ...]]:
        """State -> names of leaves that only the program has."""
        found = {matched.state.name: matched.arrival.missing for matched in self.states}
        return {state: names for state, names in found.items() if names}

    @property
    def unexpected_leaves(self) -> Mapping[str, tuple[str, ...]]:
        """State -> names of leaves that only the generation has."""
        found = {matched.state.name: matched.arrival.unexpected for matched in self.states}
        return {state: names for state, names in found.items() if names}

    def without(self, traded: Collection[LeafIndex]) -> StateMatch:
        """Return the match without some leaves that were saved whole. Not collective."""
        states = [
            matched.without({at for state, at in traded if state == number})
            for number, matched in enumerate(self.states)
        ]
        return replace(self, states=tuple(states)) if traded else self

    def leaving(self, traded: Collection[LeafIndex]) -> StateMatch:
        """Return the match with no destination for some leaves. Not collective."""
        places = {
            one.state.name: replace(
                one.arrival,
                leaves=[
                    None if (number, at) in traded else leaf
                    for at, leaf in enumerate(one.arrival.leaves)
                ],
            )
            for number, one in enumerate(self.states)
        }
        return self.with_arrivals(places)

    def with_unexpected(self, names: Mapping[str, tuple[str, ...]]) -> StateMatch:
        """Return the match with more leaves that only the generation has. Not collective.

        Args:
            names: State -> names of leaves.
        """
        arrivals = {}
        for matched in self.states:
            known, more = matched.arrival.unexpected, names.get(matched.state.name, ())
            every = tuple(dict.fromkeys((*known, *more)))
            arrivals[matched.state.name] = replace(matched.arrival, unexpected=every)
        return self.with_arrivals(arrivals) if names else self

    def warnings(self) -> list[str]:
        """Return the warnings of the states after all are restored.

        Not collective.
        """
        texts = []
        for matched in self.states:
            if isinstance(matched.state, LeafState):
                with concerning(f"state {matched.state.name!r}"):
                    texts.append(matched.state.restored())
        return [text for text in texts if text]

    def name_of(self, index: int) -> str:
        """Return the name of a leaf in messages. Not collective."""
        for matched in self.states:
            if index < len(matched.saved.specs):
                leaf = matched.saved.specs[index].name
                return f"state {matched.state.name!r}, leaf {leaf!r}"
            index -= len(matched.saved.specs)
        raise IndexError

    def without_overlaps(self, overlaps: Sequence[Overlap]) -> StateMatch:
        """Return the match with private memory for one leaf of each overlap.

        Not collective.

        Raises:
            StateMismatchError: On the calling rank, if a state has no other memory.
        """
        homes = [
            (number, at)
            for number, one in enumerate(self.states)
            for at in range(len(one.whole))
        ]
        leaves = [list(matched.arrival.leaves) for matched in self.states]

        def move(index: int) -> bool:
            number, at = homes[index]
            leaf = self.states[number].arrival.elsewhere(at)
            leaves[number][at] = leaf or leaves[number][at]
            return leaf is not None

        separate_overlaps(overlaps, move, self.name_of)
        return self.with_arrivals(
            {
                matched.state.name: replace(matched.arrival, leaves=mine)
                for matched, mine in zip(self.states, leaves, strict=True)
            }
        )

    def with_arrivals(self, arrivals: Mapping[str, Arrival]) -> StateMatch:
        """Return the match with other arrivals for some states. Not collective."""
        states = tuple(
            replace(matched, arrival=arrivals.get(matched.state.name, matched.arrival))
            for matched in self.states
        )
        return replace(self, states=states)


def _are_cut(leaves: Sequence[Leaf | None]) -> bool:
    """Return whether one of some leaves is cut. Not collective."""
    found = list(map(_TILES, filter(None, leaves)))
    return found.count(None) < len(found)


def compare_names(
    outline: Outline, states: Sequence[State], *, partial: bool, strict: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Match the names of states. Not collective: the same on every rank.

    Args:
        outline: Outline of the generation.
        states: The requested states.
        partial: Whether the generation may have other states.
        strict: Whether any other difference is an error.

    Returns:
        The names that only the program has, and those that only the generation has.

    Raises:
        StateMismatchError: On every rank, with all missing and unexpected names.
    """
    saved = {outlined.name for outlined in outline.states}
    missing = tuple(state.name for state in states if state.name not in saved)
    unexpected = () if partial else outline.others
    problems = [f"state {name!r} is in the program, not saved" for name in missing]
    problems += [f"state {name!r} is saved, not in the program" for name in unexpected]
    if problems and strict:
        hint = f"\n{ADVICE}" if numbered_alike(missing, unexpected) else ""
        raise StateMismatchError(
            f"{outline.title} has other states than the program; nothing "
            "was changed (Options(strict=False) restores what both have):\n  "
            + cut_lines("\n  ".join(problems), _PROBLEMS_MAX)
            + hint,
            generation=outline.generation,
            problems=problems,
        )
    return missing, unexpected


def match_states(
    outline: Outline, states: Sequence[State], *, strict: bool
) -> tuple[MatchedState, ...]:
    """Find a place for every byte before the first one moves.

    Not collective. Called on every rank.

    Args:
        outline: Outline of the generation or the copy, made on root.
        states: The states of the program; states that were not saved are left out.
        strict: Whether a leaf that only one side has is a mismatch.

    Raises:
        StateMismatchError: On the calling rank, with all mismatches of all states.
    """
    by_name = {outlined.name: outlined for outlined in outline.states}
    matched: list[MatchedState] = []
    problems: list[str] = []
    for state in states:
        saved = by_name.get(state.name)
        if saved is None:
            continue
        try:
            with concerning(f"state {state.name!r}"), following():
                matched.append(MatchedState(state, saved, _match(saved, state, strict)))
        except StateMismatchError as error:
            problems += error.problems or [str(error)]
    if problems:
        raise StateMismatchError(
            f"{outline.title} does not fit the program, nothing was changed:\n  "
            + cut_lines("\n  ".join(problems), _PROBLEMS_MAX)
            + f"\n{_HOW_TO_GO_ON}",
            generation=outline.generation,
            problems=problems,
        )
    return tuple(matched)


def _match(saved: StateOutline, state: State, strict: bool) -> Arrival:
    if isinstance(state, RankedState) and saved.parts is not None:
        missing, unexpected = state.check(saved.structure, saved.parts, strict=strict)
        # A placeholder for this rank's part, which is not known before root deals it.
        return Arrival((), _nothing, missing, unexpected)
    if saved.is_stream:
        if isinstance(state, LeafState):
            raise StateMismatchError(f"state {state.name!r} was saved as a stream")
        leaf = Leaf(saved.specs[0], MemoryBuffer.empty(saved.specs[0].nbytes))
        return Arrival((leaf,), lambda: state.load(io.BytesIO(leaf.buffer.read())))
    if not isinstance(state, LeafState):
        raise StateMismatchError(f"state {state.name!r} was saved as leaves")
    return state.prepare(saved.structure, saved.leaves, strict=strict)


def _nothing() -> None:
    """Adopt nothing, for a part that has not arrived."""
