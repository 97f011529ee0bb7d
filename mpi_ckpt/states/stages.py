# SPDX-License-Identifier: Apache-2.0
"""Names the state of an optimizer by parameters, where other ranks have other ones.

Each stage of a pipeline has an optimizer over its own parameters, counted from 0: the
numbers of two stages say different things. Here names of parameters stand in the names of
leaves, and the structure has hyperparameters only: it is the same on all ranks. Each leaf
is cut, since only the ranks of a stage have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import StageError
from mpi_ckpt.states.leaf_values import is_leaf_value, memory_leaf, single_tile
from mpi_ckpt.states.optimizer_params import BY_NAME, NAMELESS, OWNED, STATE, Names
from mpi_ckpt.states.wrappers import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mpi_ckpt.leaves.leaf import Leaf


def is_stage(params: Iterable[Any], size: int) -> bool:
    """Return whether other ranks may have other parameters than this one.

    Not collective. So it is if a parameter is cut over fewer ranks than there are.

    Args:
        params: The parameters of this rank.
        size: Number of all ranks.
    """
    return any(is_dtensor(param) and param.device_mesh.size() < size for param in params)


def are_names(names: Names) -> bool:
    """Return whether every parameter has a name of its own in its group.

    Not collective. Thread-safe.
    """
    return all(None not in group and len({*group}) == len(group) for group in names)


def named_contents(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested value of an optimizer without what only some ranks know of it.

    Not collective. Thread-safe.

    Args:
        contents: The value of an optimizer that all ranks have alike.
    """
    content = contents["content"]
    groups = [
        {**{key: v for key, v in group.items() if key != "param_names"}, "params": []}
        for group in content["param_groups"]
    ]
    return {
        **contents,
        "content": {**content, "state": {}, "param_groups": groups},
        "params": [[] for _ in groups],
        "names": [[] for _ in groups],
        OWNED: 1,
        BY_NAME: 1,
    }


def named_leaves(
    groups: Sequence[Mapping[str, Any]],
    names: Names,
    state: Mapping[Any, Mapping[str, Any]],
) -> list[Leaf]:
    """Return the state of this rank's parameters as leaves.

    Not collective.

    Args:
        groups: The optimizer's parameter groups.
        names: The names of their parameters.
        state: Parameter -> its state.

    Raises:
        StageError: On the calling rank, if a parameter has no name, or an entry of its
            state is no tensor.
    """
    if not are_names(names):
        raise StageError(NAMELESS)
    return [
        _leaf(f"{STATE}{number}/{name}", key, value)
        for number, (group, of_group) in enumerate(zip(groups, names, strict=True))
        for param, name in zip(group["params"], of_group, strict=True)
        for key, value in state.get(param, {}).items()
    ]


def _leaf(owner: str, key: str, value: object) -> Leaf:
    if type(key) is not str or "/" in key or not is_leaf_value(value):
        raise StageError(
            f"{owner}: the state {key!r} is a {type(value).__name__}; where ranks have "
            "different parameters, only tensors are saved"
        )
    return single_tile(memory_leaf(f"{owner}/{key}", value))
