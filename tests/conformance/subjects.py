# SPDX-License-Identifier: Apache-2.0
"""What is tried: something that is saved, restored into a fresh one, and goes on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mpi_ckpt.errors import CheckpointError
from tests.making import carry
from tests.values import alike

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi_ckpt.state import LeafState

SAVED, FRESH = 1, 2
"""Seeds: of what is saved, and of what it is restored into."""


class Subject(Protocol):
    """A thing with contents that one state holds."""

    def state(self, name: str) -> LeafState:
        """Return a state that holds it."""

    def advance(self) -> Any:
        """Go one step on, the same step for each of a case; return what came out."""

    def contents(self) -> Any:
        """Return all that it holds, as a nested value."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        group: Chapter of the table.
        what: A class, or a kind of elements.
        form: A configuration, or how elements lie in memory.
        make: Makes the subject from a seed: another seed, other contents.
    """

    group: str
    what: str
    form: str
    make: Callable[[int], Subject]

    def __str__(self) -> str:
        return f"{self.group}: {self.what}, {self.form}"


class Kept:
    """A subject that is nothing but contents, and does not go on."""

    def __init__(
        self, value: Any, hold: Callable[[str, Any], LeafState], look: Callable[[Any], Any]
    ) -> None:
        self._value, self._hold, self._look = value, hold, look
        self._state: Any = None

    def state(self, name: str) -> LeafState:
        self._state = self._hold(name, self._value)
        return self._state

    def advance(self) -> None:
        return None

    def contents(self) -> Any:
        return self._look(self._value if self._state is None else self._state)


def refusal(case: Case) -> str | None:
    """Save and restore a subject; return the words of the refusal, if it is refused.

    Raises:
        AssertionError: It came back as something else, or was refused without its name
            or with other contents than before.
    """
    saved = case.make(SAVED)
    saved.advance()
    try:
        source = saved.state("subject")
        source.capture()
    except CheckpointError as error:
        return str(error)
    live = case.make(FRESH)
    before = copy.deepcopy(live.contents())
    try:
        carry(source, live.state("subject"))
    except CheckpointError as error:
        assert alike(live.contents(), before), f"{case}: refused, and changed"
        return str(error)
    require_same(case, saved, live)
    return None


def require_same(case: Case, saved: Subject, live: Subject) -> None:
    """Require equal contents, now and after one more step."""
    assert alike(live.contents(), saved.contents()), f"{case}: changed by the restore"
    assert alike(live.advance(), saved.advance()), f"{case}: its next step is another"
    assert alike(live.contents(), saved.contents()), f"{case}: changed by its next step"
