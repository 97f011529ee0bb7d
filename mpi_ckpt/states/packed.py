# SPDX-License-Identifier: Apache-2.0
"""A nested value as bytes, and back: what a rank sends of its own."""

from __future__ import annotations

import io
from typing import Any

from mpi_ckpt.states.leaf_values import make_value
from mpi_ckpt.states.tree import flatten, leaf_nodes, unflatten
from mpi_ckpt.storage.stream import fill_leaves, read_form, write_leaves

__all__ = ["pack", "unpack"]


def pack(value: Any) -> bytes:  # noqa: ANN401 (any nested value)
    """Return the bytes of a nested value. Not collective.

    Raises:
        StageError: On the calling rank, for a value that would not come back as it is.
    """
    flattened = flatten(value)
    stream = io.BytesIO()
    write_leaves(stream, flattened.structure, tuple(flattened.leaves.values()))
    return stream.getvalue()


def unpack(data: bytes) -> Any:  # noqa: ANN401 (any nested value)
    """Make the value that `pack` was given. Not collective.

    Raises:
        StateMismatchError: On the calling rank, if it cannot be made here.
        CorruptGenerationError: On the calling rank, if the bytes are damaged.
    """
    stream = io.BytesIO(data)
    structure, specs = read_form(stream)
    nodes = leaf_nodes(structure)
    made = [make_value(spec, nodes.get(spec.name, {})) for spec in specs]
    fill_leaves(stream, specs, [leaf for _, leaf in made])
    values = {spec.name: value for spec, (value, _) in zip(specs, made, strict=True)}
    return unflatten(structure, values)
