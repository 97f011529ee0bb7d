# SPDX-License-Identifier: Apache-2.0
"""Which leaf goes where in a file. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from mpi_ckpt import dtypes
from mpi_ckpt.storage.tensorfile import encode_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaf import LeafSpec

__all__ = ["LeafKey", "Placement", "ShardPlan", "plan_shard"]

LeafKey = tuple[str, str]
"""Names of the state and of the leaf."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one leaf lies.

    Attributes:
        state: Index of its state.
        leaf: Index of the leaf in its state.
        key: Names of its state and of itself.
        offset: Where it starts in the file, in bytes.
        nbytes: Its length.
    """

    state: int
    leaf: int
    key: LeafKey
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The layout of one file.

    Attributes:
        header: The bytes before the first leaf.
        placements: The leaves in file order, without holes.
        nbytes: Size of the file.
    """

    header: bytes
    placements: tuple[Placement, ...]
    nbytes: int


def plan_shard(states: Sequence[tuple[str, Sequence[LeafSpec]]]) -> ShardPlan:
    """Lay out the leaves of several states in one safetensors file.

    Not collective. Thread-safe. Leaves of larger elements come first, so that every
    leaf is aligned to its own elements; otherwise the order is the states'.

    Args:
        states: Name and leaves of each state.

    Raises:
        SaveError: On the calling rank, if the header would be too large to be read.
    """
    order = sorted(
        (
            (index, number)
            for index, (_, specs) in enumerate(states)
            for number in range(len(specs))
        ),
        key=lambda at: -dtypes.element_bytes(states[at[0]][1][at[1]].dtype),
    )
    specs = [states[index][1][number] for index, number in order]
    # A state's name is encoded, so that "a/b" + "c" and "a" + "b/c" stay apart.
    prefixes = [quote(name, safe="") for name, _ in states]
    names = [
        f"{prefixes[index]}/{spec.name}"
        for (index, _), spec in zip(order, specs, strict=True)
    ]
    header = encode_header(zip(names, specs, strict=True), {"format": "mpi_ckpt"})
    placements = []
    offset = len(header)
    for (index, number), spec in zip(order, specs, strict=True):
        key = (states[index][0], spec.name)
        placements.append(Placement(index, number, key, offset, spec.nbytes))
        offset += spec.nbytes
    return ShardPlan(header, tuple(placements), offset)
