# SPDX-License-Identifier: Apache-2.0
"""Encodes a nested value as bytes, and decodes it: a rank's part of a state."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import CorruptGenerationError, StageError
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, Tile
from mpi_ckpt.leaves.tiles import cut_leaf
from mpi_ckpt.memory import round_up
from mpi_ckpt.states.arrays import array_leaf
from mpi_ckpt.states.leaf_values import make_value, refuse_attributes
from mpi_ckpt.states.tree import flatten, leaf_nodes, unflatten
from mpi_ckpt.storage.format.layout import part_leaf_name, structure_name
from mpi_ckpt.storage.format.strict_json import read_json
from mpi_ckpt.storage.format.tensorfile import (
    encode_form,
    fill_leaves,
    read_form,
    write_leaves,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaves.leaf import TileBuffer
    from mpi_ckpt.state import Structure
    from mpi_ckpt.states.tree import Flattened

_TEXT_STEP = 256


def pack(value: Any) -> bytes:  # noqa: ANN401 (any nested value)
    """Return the bytes of a nested value. Not collective.

    Raises:
        StageError: On the calling rank, for a value that a restore would change.
    """
    flattened = _flatten_own(value)
    stream = io.BytesIO()
    write_leaves(stream, flattened.structure, tuple(flattened.leaves.values()))
    return stream.getvalue()


def _flatten_own(value: Any) -> Flattened:  # noqa: ANN401
    flattened = flatten(value)
    refuse_attributes(flattened.values)
    cut = [name for name, leaf in flattened.leaves.items() if leaf.tiles is not None]
    if cut:
        raise StageError(
            f"{', '.join(cut)}: a DTensor is no value of a single rank; save it in an "
            "ObjectState, or its full_tensor() here"
        )
    return flattened


def part_leaves(rank: int, value: Any) -> list[Leaf]:  # noqa: ANN401 (any nested value)
    """Return a rank's part as the leaves by which it is saved.

    Not collective. Tensors and arrays are not copied.

    Args:
        rank: The rank.
        value: Its value.

    Returns:
        The leaf with the structure, and one for each tensor and array.

    Raises:
        StageError: On the calling rank, for a value that a restore would change.
    """
    flattened = _flatten_own(value)
    text = np.frombuffer(_structure_text(flattened.structure), np.uint8)
    leaves = [array_leaf(structure_name(rank), text)]
    for leaf in flattened.leaves.values():
        spec = leaf.spec
        saved = LeafSpec(part_leaf_name(rank, spec.name), spec.dtype, spec.shape)
        leaves.append(Leaf(saved, leaf.buffer))
    return leaves


def cut_part_leaves(rank: int, value: Any) -> list[Leaf]:  # noqa: ANN401
    """Return the leaves of `part_leaves`, each cut: this rank has all of it in one tile.

    Not collective. Arguments and errors are those of `part_leaves`.
    """
    return [_of_one_rank(leaf) for leaf in part_leaves(rank, value)]


def _of_one_rank(leaf: Leaf) -> Leaf:
    # The leaves of arrays and tensors have memory of which boxes can be taken.
    whole = Tile(Box.whole(leaf.spec.shape), cast("TileBuffer", leaf.buffer))
    return cut_leaf(leaf.spec, [whole] if leaf.spec.nbytes else [])


def _structure_text(structure: Structure) -> bytes:
    # Spaces after it: with a few digits more or less, the leaf keeps its form from save to
    # save, and the ranks need not describe their leaves to root again.
    text = json.dumps(structure).encode()
    return text.ljust(round_up(len(text), _TEXT_STEP))


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


def packed_head(text: bytes, specs: Sequence[LeafSpec], names: Sequence[str]) -> bytes:
    """Return what comes before the bytes of saved leaves, to make them those of `pack`.

    Not collective.

    Args:
        text: The bytes of the leaf with the structure.
        specs: The specs of the other leaves, as saved.
        names: Their names within the part.

    Raises:
        CorruptGenerationError: On the calling rank, if the structure is no JSON.
    """
    try:
        structure = read_json(text)
    except ValueError as error:
        raise CorruptGenerationError(f"the structure of a part: {error}") from error
    own = [LeafSpec(n, s.dtype, s.shape) for n, s in zip(names, specs, strict=True)]
    return encode_form(structure, own)


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
