# SPDX-License-Identifier: Apache-2.0
"""The states of a manager, by name, and the agreement of the ranks about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.comm import agree, compare_texts
from mpi_ckpt.engine.names import ADVICE, differ_in_numbers
from mpi_ckpt.errors import RegistrationError
from mpi_ckpt.state import LeafState, State
from mpi_ckpt.storage.layout import check_names_apart

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mpi_ckpt.comm import Communicator

__all__ = ["Registry"]


class Registry:
    """States in saving order. Not thread-safe.

    Args:
        comm: Given to states that want it.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._states: dict[str, State] = {}

    @property
    def names(self) -> list[str]:
        """The names, in saving order."""
        return list(self._states)

    def add_all(self, states: Sequence[State]) -> None:
        """Take in the states of a manager that begins.

        Collective. Main thread only.

        Raises:
            RegistrationError: On every rank, if one cannot be taken in on any, or names
                or their order differ between ranks.
        """

        def add_all() -> None:
            for state in states:
                self.add(state)

        agree(self._comm, "registering states", add_all, error=RegistrationError)
        self.choose(None, skipped=True)

    def add(self, state: State) -> None:
        """Take in a state. Not collective.

        Raises:
            RegistrationError: On the calling rank, if it is no state or its name is
                taken.
        """
        if not isinstance(state, State):
            raise RegistrationError(f"{state!r} is not a State")
        check_names_apart([*self._states, state.name])
        if isinstance(state, LeafState):
            state.bind(self._comm)
        self._states[state.name] = state

    def remove(self, name: str) -> None:
        """Forget a state. Not collective.

        Raises:
            RegistrationError: On the calling rank, if there is no such state.
        """
        if name not in self._states:
            raise RegistrationError(f"there is no state {name!r}")
        del self._states[name]

    def choose(self, only: Collection[str] | None, *, skipped: bool = False) -> list[State]:
        """Return the states meant, once all ranks have found that they mean the same.

        Collective. Main thread only.

        Args:
            only: Names; None for all.
            skipped: Whether "all" means those with ``skip`` as well.

        Raises:
            RegistrationError: On every rank, if a name is unknown on any, or names or
                their order differ between ranks.
        """

        def choose() -> list[State]:
            unknown = set(only or ()) - set(self._states)
            if unknown:
                raise RegistrationError(f"there are no states {sorted(unknown)}")
            return [
                state
                for name, state in self._states.items()
                if (name in only if only is not None else skipped or not state.skip)
            ]

        chosen = agree(self._comm, "choosing states", choose, error=RegistrationError)
        names = [state.name for state in chosen]
        problems = compare_texts(self._comm, "comparing the states' names", names)
        if problems:
            theirs, _, roots = problems[0].partition(" has ")[2].partition(", root has ")
            hint = f"\n{ADVICE}" if differ_in_numbers(theirs, roots) else ""
            raise RegistrationError(
                "the ranks have different states, or another order:\n  "
                + "\n  ".join(problems)
                + hint,
                problems=problems,
            )
        return chosen
