# SPDX-License-Identifier: Apache-2.0
"""Anything with state_dict() and load_state_dict(): schedulers, scalers, loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from mpi_ckpt.states.nested import NestedState

if TYPE_CHECKING:
    from mpi_ckpt.state import SyncMode

__all__ = ["SchedulerState", "Stateful"]


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
        scheduler: Its ``state_dict()`` holds plain values, tensors and arrays only.
        sync: As for `LeafState`.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal.
    """

    def __init__(self, name: str, scheduler: Stateful, *, sync: SyncMode = "root") -> None:
        super().__init__(name, sync=sync)
        self._scheduler = scheduler

    def nested(self) -> Any:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        return self._scheduler.state_dict()

    def accept(self, value: Any) -> None:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        self._scheduler.load_state_dict(value)
