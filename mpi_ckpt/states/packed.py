# SPDX-License-Identifier: Apache-2.0
"""Encodes a nested value as bytes, and decodes it: a rank's part of a state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import StageError
from mpi_ckpt.states.leaf_values import make_value
from mpi_ckpt.states.tree import flatten, leaf_nodes, unflatten
from mpi_ckpt.storage.format.tensorfile import fill_leaves, read_form, write_leaves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaf import Leaf, LeafSpec
    from mpi_ckpt.state import Structure


def pack(value: Any) -> bytes:  # noqa: ANN401 (any nested value)
    """Return the bytes of a nested value. Not collective.

    Raises:
        StageError: On the calling rank, for a value that a restore would change.
    """
    flattened = flatten(value)
    cut = [name for name, leaf in flattened.leaves.items() if leaf.tiles is not None]
    if cut:
        raise StageError(
            f"{', '.join(cut)}: a DTensor is no value of a single rank; save it in an "
            "ObjectState, or its full_tensor() here"
        )
    stream = io.BytesIO()
    write_leaves(stream, flattened.structure, tuple(flattened.leaves.values()))
    return stream.getvalue()


def unpack(data: bytes) -> Any:  # noqa: ANN401 (any nested value)
    """Make the value from the bytes of `pack`. Not collective.

    Raises:
        StateMismatchError: On the calling rank, if it cannot be made here.
        CorruptGenerationError: On the calling rank, if the bytes are damaged.
    """
    stream = io.BytesIO(data)
    structure, specs = read_form(stream)
    values, leaves = make_values(structure, specs)
    fill_leaves(stream, specs, leaves)
    return unflatten(structure, values)


def make_values(
    structure: Structure, specs: Sequence[LeafSpec]
) -> tuple[dict[str, Any], list[Leaf]]:
    """Make the tensors and arrays of a nested value, and the leaves to fill them by.

    Not collective.

    Args:
        structure: What `flatten` made.
        specs: Specs of its leaves.

    Returns:
        The values by name of leaf, and the leaves in order.

    Raises:
        StateMismatchError: On the calling rank, if a value cannot be made here.
    """
    nodes = leaf_nodes(structure)
    values: dict[str, Any] = {}
    leaves = []
    for spec in specs:
        values[spec.name], leaf = make_value(spec, nodes.get(spec.name, {}))
        leaves.append(leaf)
    return values, leaves
