# SPDX-License-Identifier: Apache-2.0
"""Handles optimizers whose state is dealt out over the ranks, parameter by parameter.

``torch.distributed.optim.ZeroRedundancyOptimizer`` gives each parameter to a rank, whose
inner optimizer alone has its state. Its own ``state_dict()`` collects all state on a rank.
Here the state of a parameter is a leaf of its owner, which is cut into a single tile.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import StageError
from mpi_ckpt.states.buffers.memory_layout import ReadonlyMemory
from mpi_ckpt.states.leaf_values import (
    is_leaf_value,
    make_value,
    memory_leaf,
    single_tile,
    takes_bytes,
)
from mpi_ckpt.states.optimizer_params import STATE, entries_of
from mpi_ckpt.states.tree import check_structure, leaf_nodes, unflatten

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi_ckpt.leaves.leaf import Leaf, LeafSpec
    from mpi_ckpt.state import Structure

_HOME = "torch.distributed.optim.zero_redundancy_optimizer"


def is_dealt_out(optimizer: object) -> bool:
    """Return whether an optimizer is a ZeroRedundancyOptimizer. Not collective."""
    # It can only be one if the program has imported the class; an import costs seconds.
    known: Any = getattr(sys.modules.get(_HOME), "ZeroRedundancyOptimizer", None)
    return known is not None and isinstance(optimizer, known)


class OwnedState:
    """The state of the parameters that this rank owns.

    Not collective.

    Args:
        optimizer: A ZeroRedundancyOptimizer.
    """

    def __init__(self, optimizer: Any) -> None:  # noqa: ANN401
        self._optimizer = optimizer

    @property
    def class_name(self) -> str:
        """Name of the class of the inner optimizer, whose state it is."""
        return type(self._inner).__name__

    def groups(self) -> dict[str, Any]:
        """Return the state dict of the outer optimizer, without the state of parameters."""
        import torch

        outer: dict[str, Any] = torch.optim.Optimizer.state_dict(self._optimizer)
        return {**outer, "state": {}}

    def leaves(self) -> list[Leaf]:
        """Return the state of the owned parameters as leaves.

        Raises:
            StageError: On the calling rank, if an entry is no tensor.
        """
        return [
            single_tile(memory_leaf(f"{STATE}{index}/{key}", value))
            for index, param in self._owned().items()
            for key, value in self._entry(index, param).items()
        ]

    def targets(
        self,
        structure: Structure,
        specs: Sequence[LeafSpec],
        device_of: Callable[[str], Any],
    ) -> tuple[list[Leaf | None], Callable[[], None]]:
        """Return the destinations of saved state, and a function that takes it over.

        Args:
            structure: The saved structure, with the entries of all parameters.
            specs: The saved leaves of their state.
            device_of: Returns the device of a new tensor for a leaf.

        Returns:
            For each leaf a single tile if this rank owns its parameter, else None; and the
            function.

        Raises:
            StateMismatchError: On the calling rank, if the structure has no such form, or a
                value cannot be made.
        """
        entries = entries_of(structure)
        check_structure([entry for _, entry in entries], specs)
        owned, nodes = self._owned(), leaf_nodes([entry for _, entry in entries])
        memory = ReadonlyMemory()
        arriving: dict[str, Any] = {}
        leaves: list[Leaf | None] = []
        for spec in specs:
            index, _, key = spec.name.removeprefix(STATE).partition("/")
            param = owned.get(int(index)) if index.isdecimal() else None
            if param is None:
                leaves.append(None)
                continue
            live = self._inner.state.get(param, {}).get(key)
            leaf = memory_leaf(spec.name, live) if is_leaf_value(live) else None
            if leaf is None or leaf.spec != spec or not takes_bytes(live, memory):
                node = nodes.get(spec.name, {})
                live, leaf = make_value(spec, node, device_of(spec.name))
            arriving[spec.name] = live
            leaves.append(single_tile(leaf))

        def take() -> None:
            state = self._inner.state
            state.clear()
            for index, entry in entries:
                if index in owned:
                    state[owned[index]] = unflatten(entry, arriving)

        return leaves, take

    def take_groups(self) -> None:
        """Give the inner optimizer the values of the outer one's groups."""
        outer, inner = self._optimizer.param_groups, self._inner
        for given, own in zip(outer, inner.param_groups, strict=True):
            own.update({key: value for key, value in given.items() if key != "params"})
        # Optimizers add values here that their older versions did not save.
        inner.__setstate__({"state": inner.state, "param_groups": inner.param_groups})

    @property
    def _inner(self) -> Any:  # noqa: ANN401
        return self._optimizer.optim

    def _owned(self) -> dict[int, Any]:
        """Return the owned parameters by their index in the outer groups."""
        own = {id(p) for group in self._inner.param_groups for p in group["params"]}
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        return {index: param for index, param in enumerate(params) if id(param) in own}

    def _entry(self, index: int, param: Any) -> dict[str, Any]:  # noqa: ANN401
        entry = dict(self._inner.state.get(param, {}))
        for key, value in entry.items():
            if type(key) is not str or "/" in key or not is_leaf_value(value):
                raise StageError(
                    f"the state {key!r} of parameter {index} of a ZeroRedundancyOptimizer "
                    f"is a {type(value).__name__}: only its owner has it, and only tensors "
                    "are saved from a single rank; take the inner optimizer without it"
                )
        return entry
