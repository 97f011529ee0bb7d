# SPDX-License-Identifier: Apache-2.0
"""Which generation to restore, and which of the program's states are in it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import any_of, bcast_json
from mpi_ckpt.engine.description import describe_generation, title_of
from mpi_ckpt.engine.names import ADVICE, numbered_alike
from mpi_ckpt.errors import (
    CorruptGenerationError,
    ReadError,
    RestoreError,
    StateMismatchError,
)
from mpi_ckpt.states.ranked import RankedState
from mpi_ckpt.storage.layout import generation_name
from mpi_ckpt.storage.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.directory import CheckpointDirectory

__all__ = ["Fit", "Found", "find_newest", "fit_states", "is_lost", "reject"]


@dataclass(frozen=True, slots=True)
class Found:
    """A generation that looks good.

    Attributes:
        description: What `mpi_ckpt.engine.description` says of it, on every rank.
        reader: The open generation on root; None elsewhere.
    """

    description: dict[str, Any]
    reader: GenerationReader | None

    @property
    def generation(self) -> int:
        """Its number."""
        number: int = self.description["generation"]
        return number


@dataclass(frozen=True, slots=True)
class Fit:
    """How the program's states and those of a generation meet.

    Attributes:
        states: States of the program that the generation has.
        missing: Names of states that only the program has.
        unexpected: Names of states that only the generation has.
        missing_leaves: State -> names of leaves that only the program has.
        unexpected_leaves: State -> names of leaves that only the generation has.
    """

    states: tuple[State, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    missing_leaves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unexpected_leaves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@contextmanager
def find_newest(
    session: Session, states: Sequence[State], *, pinned: int | None, proven: bool
) -> Iterator[Found | None]:
    """Find the newest good generation; root keeps it open within the block.

    Collective. Main thread only.

    Args:
        session: The session.
        states: Those of the program that are wanted, the same on every rank.
        pinned: Number of the generation that must be used; None for the newest.
        proven: Whether to verify all its bytes here, because later restores will take
            other states from it.

    Raises:
        RestoreError: On every rank, if root finds generations but no good one.
    """

    def look() -> GenerationReader | None:
        return _open(session.directory, pinned, proven=proven)

    reader = session.on_root("looking for a generation", look, RestoreError)
    try:
        mine = None
        if reader is not None:
            mine = _needed(describe_generation(reader.manifest), states)
        description = bcast_json(session.comm, mine, "telling of a generation")
        yield None if description is None else Found(description, reader)
    finally:
        if reader is not None:
            reader.close()


def _needed(description: dict[str, Any], states: Sequence[State]) -> dict[str, Any]:
    """Leave out what no rank but root has a use for, and what grows with the ranks."""
    wanted = {state.name: state for state in states}
    for name, saved in description["states"].items():
        if name not in wanted:
            saved.clear()
        elif isinstance(wanted[name], RankedState) and "leaves" in saved:
            saved.update(parts=len(saved.pop("leaves")), places=[])
    return description


def fit_states(
    found: Found, states: Sequence[State], *, partial: bool, strict: bool
) -> Fit:
    """Match the names of states. Not collective: the same on every rank.

    Args:
        found: The generation.
        states: The states wanted.
        partial: Whether it is understood that the generation has others.
        strict: Whether any other difference is an error.

    Raises:
        StateMismatchError: On every rank, naming all that are missing or unexpected.
    """
    saved = found.description["states"]
    names = {state.name for state in states}
    missing = tuple(state.name for state in states if state.name not in saved)
    unexpected = () if partial else tuple(name for name in saved if name not in names)
    problems = [f"state {name!r} is in the program, not saved" for name in missing]
    problems += [f"state {name!r} is saved, not in the program" for name in unexpected]
    if problems and strict:
        hint = f"\n{ADVICE}" if numbered_alike(missing, unexpected) else ""
        raise StateMismatchError(
            f"{title_of(found.description)} has other states than the program; nothing "
            "was changed (Options(strict=False) restores what both have):\n  "
            + "\n  ".join(problems)
            + hint,
            generation=found.generation,
            problems=problems,
        )
    there = tuple(state for state in states if state.name in saved)
    return Fit(there, missing, unexpected)


def reject(session: Session, found: Found, problem: CorruptGenerationError) -> None:
    """Set a generation aside that turned out bad while it was read.

    Collective. Main thread only.

    Raises:
        RestoreError: On every rank, if root cannot.
    """
    session.on_root(
        "setting a generation aside",
        lambda: session.directory.reject(found.generation, problem),
        RestoreError,
    )


def is_lost(session: Session, found: Found) -> bool:
    """Tell whether a generation was pruned while it was read, by the job that owns it.

    Collective. Main thread only. A job that has not got the lock reads beside the owner.
    """
    gone = session.comm.is_root and session.directory.has_lost(found.generation)
    return any_of(session.comm, "looking whether a generation is still there", gone)[0]


def _open(
    directory: CheckpointDirectory, pinned: int | None, *, proven: bool
) -> GenerationReader | None:
    if pinned is not None:
        return GenerationReader(directory.root / generation_name(pinned))
    while True:
        reader = directory.open_newest()
        if reader is None or not proven:
            return reader
        number = reader.manifest.generation
        try:
            reader.verify()
        except CorruptGenerationError as problem:
            reader.close()
            directory.reject(number, problem)
        except ReadError:
            reader.close()
            if not directory.has_lost(number):
                raise
        else:
            return reader
