# SPDX-License-Identifier: Apache-2.0
"""Compares saved leaves with the program's, and reports all differences at once."""

from __future__ import annotations

from operator import attrgetter, is_
from typing import TYPE_CHECKING

from mpi_ckpt.errors import StateMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaves.leaf import LeafSpec


_PARTS = attrgetter("name"), attrgetter("dtype"), attrgetter("shape")


def are_alike(saved: Sequence[LeafSpec], live: Sequence[LeafSpec]) -> bool:
    """Return whether leaves have the same names, dtypes and shapes, in the same order.

    Not collective. Thread-safe. Their attributes one by one: comparing thousands of specs
    takes ten times as long.
    """
    return len(saved) == len(live) and (
        all(map(is_, saved, live))
        or all(list(map(part, saved)) == list(map(part, live)) for part in _PARTS)
    )


def compare_specs(
    state: str,
    saved: Sequence[LeafSpec],
    live: Sequence[LeafSpec],
    *,
    common: bool = False,
) -> None:
    """Require the same names, dtypes and shapes, in any order.

    Not collective. Thread-safe.

    Args:
        state: Name of the state.
        saved: The saved leaves.
        live: The program's leaves.
        common: Whether to ignore leaves that only one side has.

    Raises:
        StateMismatchError: On the calling rank, with every difference.
    """
    by_name = {spec.name: spec for spec in live}
    names = {spec.name for spec in saved}
    if common:
        saved = [spec for spec in saved if spec.name in by_name]
        live = [spec for spec in live if spec.name in names]
    problems = [
        f"{spec} is saved, the program has no such leaf"
        for spec in saved
        if spec.name not in by_name
    ]
    problems += [
        f"{spec} is saved, the program has {by_name[spec.name]}"
        for spec in saved
        if spec.name in by_name and by_name[spec.name] != spec
    ]
    problems += [
        f"{spec} is in the program, not in the checkpoint"
        for spec in live
        if spec.name not in names
    ]
    raise_mismatch(state, problems)


def raise_mismatch(state: str, problems: Sequence[str]) -> None:
    """Raise if there are problems. Not collective. Thread-safe.

    Raises:
        StateMismatchError: On the calling rank, if the list is not empty.
    """
    if problems:
        raise StateMismatchError(
            f"state {state!r} does not fit the checkpoint; nothing was changed:\n    "
            + "\n    ".join(problems),
            problems=[f"{state}: {problem}" for problem in problems],
        )
