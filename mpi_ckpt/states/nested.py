# SPDX-License-Identifier: Apache-2.0
"""States whose contents are one nested value: objects, optimizers, schedulers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.state import Arrival, Capture, LeafState, Structure
from mpi_ckpt.states.leaf_values import make_value, takes_bytes
from mpi_ckpt.states.readonly_memory import ReadonlyMemory
from mpi_ckpt.states.tree import check_structure, flatten, leaf_nodes, unflatten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaf import Leaf, LeafSpec

__all__ = ["NestedState"]


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
        """Return the device of a new tensor for a leaf; None for the kind it was saved on.

        Not collective.
        """
        return None

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
        check_structure(structure, specs)
        live, memory = flatten(self.nested()), ReadonlyMemory()
        nodes = leaf_nodes(structure)
        arriving: dict[str, Any] = {}

        def make(spec: LeafSpec) -> Leaf:
            node, device = nodes.get(spec.name, {}), self.device_of(spec.name)
            arriving[spec.name], leaf = make_value(spec, node, device)
            return leaf

        targets = []
        for spec in specs:
            leaf, value = live.leaves.get(spec.name), live.values.get(spec.name)
            if (
                leaf is None
                or leaf.spec != spec
                or not _is_alike(live.nodes[spec.name], nodes.get(spec.name, {}))
                or not takes_bytes(value, memory)
            ):
                leaf = make(spec)
            else:
                arriving[spec.name] = value
            targets.append(leaf)
        return Arrival(
            targets,
            lambda: self.accept(unflatten(structure, arriving)),
            elsewhere=lambda index: make(specs[index]),
        )


def _is_alike(live: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Tell whether a live value is of the kind that was saved, on whatever device."""
    if live == saved:
        return True
    return {**live, "device": None} == {**saved, "device": None}
