# SPDX-License-Identifier: Apache-2.0
"""States whose contents are one nested value: objects, optimizers, schedulers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.state import Arrival, Capture, LeafState, Structure
from mpi_ckpt.states.tree import flatten, leaf_kinds, make_leaf_value, unflatten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaf import LeafSpec

__all__ = ["NestedState"]

_ANY_LEAF = np.zeros(())


class NestedState(LeafState):
    """A leaf state that gives and takes a nested value.

    Tensors that the program has already, under the same name and of the same dtype and
    shape, are restored in place; others are made.
    """

    def nested(self) -> Any:  # noqa: ANN401 (any nested value)
        """Return the live contents, by reference. Not collective."""
        raise NotImplementedError

    def accept(self, value: Any) -> None:  # noqa: ANN401 (any nested value)
        """Take over contents that have arrived. Not collective."""
        raise NotImplementedError

    def check(self, structure: Structure, specs: Sequence[LeafSpec]) -> None:
        """Raise StateMismatchError if such contents do not fit. Not collective."""

    def device_of(self, leaf: str) -> Any:  # noqa: ANN401, ARG002 (a torch device)
        """Return the device a new tensor for a leaf belongs on. Not collective."""
        return "cpu"

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        flattened = flatten(self.nested())
        return Capture(flattened.structure, tuple(flattened.leaves.values()))

    def prepare(
        self,
        structure: Structure,
        specs: Sequence[LeafSpec],
        *,
        strict: bool,  # noqa: ARG002
    ) -> Arrival:
        """See `LeafState`; what was saved is taken whole. Not collective."""
        self.check(structure, specs)
        # A structure of no known form must not be found out when leaves have arrived.
        unflatten(structure, dict.fromkeys([spec.name for spec in specs], _ANY_LEAF))
        live = flatten(self.nested())
        kinds, live_kinds = leaf_kinds(structure), leaf_kinds(live.structure)
        arriving: dict[str, Any] = {}
        targets = []
        for spec in specs:
            leaf = live.leaves.get(spec.name)
            kind = kinds.get(spec.name, "")
            value = live.values.get(spec.name)
            fits = live_kinds.get(spec.name) == kind and _is_writable(value)
            if leaf is None or leaf.spec != spec or not fits:
                value, leaf = make_leaf_value(spec, kind, self.device_of(spec.name))
            arriving[spec.name] = value
            targets.append(leaf)
        return Arrival(targets, lambda: self.accept(unflatten(structure, arriving)))


def _is_writable(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.flags.writeable
    return not isinstance(value, np.generic)
