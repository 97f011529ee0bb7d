# SPDX-License-Identifier: Apache-2.0
"""A plain Python value as a state."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.states.leaf_values import KIND
from mpi_ckpt.states.nested import NestedState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaf import LeafSpec
    from mpi_ckpt.state import Capture, Structure, SyncMode

__all__ = ["ObjectState"]

_PICKLED = "pickled"


class ObjectState(NestedState):
    """A Python value, saved as JSON with tensors and arrays beside it.

    Args:
        name: As for `mpi_ckpt.State`.
        value: None, numbers, text, bytes, tensors, arrays, and lists, tuples, sets and
            dicts of them.
        pickle: Save any picklable value instead, and allow unpickling **for this state**:
            whoever can write to the checkpoint directory can then run code in your job.
        sync: As for `LeafState`; by default replicas that differ are refused, as one
            rank's value would be lost with no error.

    Attributes:
        value: The live value. Assign to it freely between saves.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal.
    """

    def __init__(
        self,
        name: str,
        value: Any = None,  # noqa: ANN401 (any nested value)
        *,
        pickle: bool = False,
        sync: SyncMode = "check",
    ) -> None:
        super().__init__(name, sync=sync)
        self.value = value
        self._pickle = pickle

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        captured = super().capture()
        if not self._pickle and _is_pickled(captured.structure):
            raise StageError(
                f"state {self.name!r}: a value with nothing but bytes under the key "
                f"{_PICKLED!r} would be taken for a pickled one: rename the key"
            )
        return captured

    def nested(self) -> Any:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        if not self._pickle:
            return self.value
        try:
            return {_PICKLED: pickle.dumps(self.value, protocol=5)}
        except Exception as error:
            raise StageError(f"state {self.name!r} cannot be pickled: {error}") from error

    def check(self, structure: Structure, specs: Sequence[LeafSpec]) -> None:  # noqa: ARG002
        """See `NestedState`. Not collective."""
        if _is_pickled(structure) != self._pickle:
            was, now = ("with", "without") if not self._pickle else ("without", "with")
            raise StateMismatchError(
                f"state {self.name!r} was saved {was} pickle=True and is made {now} it"
            )

    def accept(self, value: Any) -> None:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        if self._pickle:
            # The user opted in for this state, by name.
            value = pickle.loads(value[_PICKLED])  # noqa: S301
        self.value = value


def _is_pickled(structure: Structure) -> bool:
    inner = structure.get(_PICKLED) if isinstance(structure, dict) else None
    return isinstance(inner, dict) and len(structure) == 1 and inner.get(KIND) == "bytes"
