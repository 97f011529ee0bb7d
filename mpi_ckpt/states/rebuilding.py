# SPDX-License-Identifier: Apache-2.0
"""Rebuilds a state from its structure and leaves, without the object that saved it."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.errors import CorruptGenerationError, StateMismatchError
from mpi_ckpt.states.leaf_values import KIND
from mpi_ckpt.states.optimizer_params import with_entries
from mpi_ckpt.states.tree import leaf_nodes, unflatten
from mpi_ckpt.storage.format.layout import find_parts
from mpi_ckpt.storage.format.strict_json import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_TRAIN_PART = re.compile(r"module|(?:optimizer|scheduler)\d*|scaler")
_TENSOR = {KIND: "tensor"}
_ARRAY = {KIND: "array"}


def nodes_of(structure: Any, names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:  # noqa: ANN401
    """Return for each leaf the JSON object that describes its value.

    Not collective.

    Args:
        structure: The saved structure; None if the state has none.
        names: The names of the leaves, as keys.
    """
    if _is_module(structure):
        nodes = leaf_nodes(structure["extra"])
        return {name: nodes.get(name, _TENSOR) for name in names}
    if _is_training(structure):
        return {
            f"{key}/{name}": node
            for key, inner in structure.items()
            for name, node in nodes_of(inner, _inside(key, names)).items()
        }
    nodes = leaf_nodes(with_entries(structure, names))
    return {name: nodes.get(name, _ARRAY) for name in names}


def rebuild(structure: Any, values: dict[str, Any]) -> Any:  # noqa: ANN401 (any nested value)
    """Rebuild a state in the form that ``load_state_dict`` takes.

    Not collective.

    Args:
        structure: The saved structure.
        values: Name of each leaf -> its tensor or array.

    Returns:
        The contents of the state if its form is known, of a state with a part for each rank
        the list of the parts; else its structure and leaves side by side.
    """
    if structure is None:
        return dict(values)
    parts = parts_in(structure, values)
    if parts:
        return [_part(part, values) for part in parts]
    if _is_module(structure):
        return _module(structure, values)
    if _is_training(structure):
        return {
            key: rebuild(inner, _inside(key, values)) for key, inner in structure.items()
        }
    try:
        structure = with_entries(structure, values)
        nodes = leaf_nodes(structure)
        if set(nodes) == set(values):
            value = unflatten(structure, _as_arrays(nodes, values))
            holds = isinstance(structure, dict) and {"class", "content"} <= set(structure)
            return value["content"] if holds else value
    except StateMismatchError:
        pass
    return {"structure": structure, "leaves": dict(values)}


@dataclass(frozen=True, slots=True)
class RankPart:
    """The leaves of one rank's part, by name.

    Attributes:
        structure: The leaf that has its structure.
        leaves: Each other leaf -> its name in that structure.
    """

    structure: str
    leaves: Mapping[str, str]

    def nodes(self, text: Any) -> dict[str, dict[str, Any]]:  # noqa: ANN401
        """Return for each leaf the JSON object that describes its value.

        Not collective.

        Args:
            text: The bytes of the leaf with the structure, uint8.
        """
        nodes = leaf_nodes(_structure_in(text))
        return {name: nodes.get(inner, _ARRAY) for name, inner in self.leaves.items()}


def parts_in(structure: Any, names: Iterable[str]) -> list[RankPart]:  # noqa: ANN401
    """Find the parts of a state of which each rank has a part. Not collective.

    Args:
        structure: The saved structure.
        names: The names of the leaves, in saving order.

    Returns:
        The parts in rank order. None for another state, and for the first form, whose
        parts are single leaves that only a restore opens.
    """
    if not isinstance(structure, dict) or not {"parts", "of"} <= set(structure):
        return []
    names = list(names)
    return [
        RankPart(
            names[part.structure],
            {names[n]: own for n, own in zip(part.numbers, part.names, strict=True)},
        )
        for part in find_parts(names)
        if part.structure is not None
    ]


def _part(part: RankPart, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    structure = _structure_in(values[part.structure])
    mine = {own: values[name] for name, own in part.leaves.items()}
    try:
        return unflatten(structure, _as_arrays(leaf_nodes(structure), mine))
    except StateMismatchError:
        return {"structure": structure, "leaves": mine}


def _structure_in(text: Any) -> Any:  # noqa: ANN401
    try:
        return read_json(np.asarray(text).tobytes())
    except ValueError as error:
        raise CorruptGenerationError(f"the structure of a rank's part: {error}") from error


def _module(structure: dict[str, Any], values: dict[str, Any]) -> Any:  # noqa: ANN401
    nodes = leaf_nodes(structure["extra"])
    module = OrderedDict((k, v) for k, v in values.items() if k not in nodes)
    try:
        for name, source in dict(structure["ties"]).items():
            module[name] = module[source]
        module.update(unflatten(structure["extra"], _as_arrays(nodes, values)))
    except (KeyError, TypeError, ValueError, StateMismatchError):
        return {"structure": structure, "leaves": dict(values)}
    return module


def _as_arrays(
    nodes: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return tensors as arrays if they encode text or lists of numbers."""
    plain = ("numbers", "bytes", "text")
    return {
        name: np.asarray(value) if nodes.get(name, {}).get(KIND) in plain else value
        for name, value in values.items()
    }


def _is_module(structure: Any) -> bool:  # noqa: ANN401
    return isinstance(structure, dict) and {"ties", "extra"} <= set(structure)


def _is_training(structure: Any) -> bool:  # noqa: ANN401
    return (
        isinstance(structure, dict)
        and "module" in structure
        and all(map(_TRAIN_PART.fullmatch, structure))
    )


def _inside(key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{key}/"
    return {
        name[len(prefix) :]: value
        for name, value in values.items()
        if name.startswith(prefix)
    }
