# SPDX-License-Identifier: Apache-2.0
"""Anything with state_dict() and load_state_dict(): schedulers, scalers, loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from mpi_ckpt.errors import RegistrationError, StateMismatchError
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.nested import NestedState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaf import LeafSpec
    from mpi_ckpt.state import Structure, SyncMode

__all__ = ["SchedulerState", "Stateful", "is_off", "is_stateful"]


class Stateful(Protocol):
    """What a `SchedulerState` can hold: also gradient scalers and data loaders.

    Not collective: neither method may communicate.
    """

    def state_dict(self) -> Any:  # noqa: ANN401
        """Return the state as nested plain values and tensors."""

    def load_state_dict(self, state_dict: Any, /) -> Any:  # noqa: ANN401
        """Take over what `state_dict` returned."""


class SchedulerState(NestedState):
    """A learning-rate scheduler, or anything else with a state dict of plain values.

    Args:
        name: As for `mpi_ckpt.State`.
        scheduler: Its ``state_dict()`` holds plain values, tensors and arrays only. Of
            the same class as when it was saved.
        sync: As for `LeafState`.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal, or
            it has no such methods.
    """

    def __init__(self, name: str, scheduler: Stateful, *, sync: SyncMode = "root") -> None:
        super().__init__(name, sync=sync)
        if not is_stateful(scheduler):
            raise RegistrationError(
                f"state {name!r}: a {type(scheduler).__name__} has no state_dict() and "
                "load_state_dict(): take an ObjectState for plain values, or a State of "
                "your own"
            )
        self._scheduler = scheduler

    def nested(self) -> Any:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        return {
            "class": type(self._scheduler).__name__,
            "off": is_off(self._scheduler),
            "content": self._scheduler.state_dict(),
        }

    def check(self, structure: Structure, specs: Sequence[LeafSpec]) -> None:  # noqa: ARG002
        """See `NestedState`. Not collective."""
        if not isinstance(structure, dict) or not {"class", "content"} <= set(structure):
            raise StateMismatchError(
                f"state {self.name!r} was not saved from a scheduler or the like"
            )
        saved, live = structure["class"], type(self._scheduler).__name__
        problems = []
        if saved != live:
            problems.append(f"it was saved from a {saved}, the program has a {live}")
        was_off, now_off = bool(structure.get("off")), is_off(self._scheduler)
        if was_off != now_off:
            told = ["enabled", "switched off"]
            problems.append(
                f"the {live} was {told[was_off]} when it was saved, and is {told[now_off]}"
            )
        raise_mismatch(self.name, problems)

    def accept(self, value: Any) -> None:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        self._scheduler.load_state_dict(value["content"])


def is_stateful(value: object) -> bool:
    """Tell whether a value has ``state_dict()`` and ``load_state_dict()``.

    Not collective.
    """
    methods = ("state_dict", "load_state_dict")
    return all(callable(getattr(value, one, None)) for one in methods)


def is_off(value: object) -> bool:
    """Tell whether it is something switched off, as a scaler of gradients can be.

    Not collective. Such a one has nothing to save, and takes nothing.
    """
    asked = getattr(value, "is_enabled", None)
    return callable(asked) and not asked()
