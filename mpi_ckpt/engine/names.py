# SPDX-License-Identifier: Apache-2.0
"""Names of states that carry a rank or the number of ranks, by mistake. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["ADVICE", "differ_in_numbers", "numbered_alike"]

ADVICE = (
    "a state's name must not carry a rank or the number of ranks: use one name on all "
    "ranks; what each rank has of its own goes into a PerRankState"
)


def differ_in_numbers(one: str, other: str) -> bool:
    """Return whether two texts differ, but only in numbers.

    Not collective. Thread-safe.
    """
    return one != other and _without_numbers(one) == _without_numbers(other)


def numbered_alike(some: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of names that differ in numbers only, one for each of ``some``.

    Not collective. Thread-safe.

    Args:
        some: Names.
        others: Other names.
    """
    by_form: dict[str, str] = {}
    for name in others:
        by_form.setdefault(_without_numbers(name), name)
    return [
        (name, by_form[form])
        for name in some
        if (form := _without_numbers(name)) in by_form
    ]


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "#", text)
