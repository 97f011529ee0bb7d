# SPDX-License-Identifier: Apache-2.0
"""Finds the box of each rank in a Cartesian grid of ranks from the lengths of its part."""

from __future__ import annotations

from math import prod
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import RegistrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class RankGroup(Protocol):
    """The part of an mpi4py communicator that finds a rank's place in a global array."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def allgather(self, sendobj: Any, /) -> list[Any]:  # noqa: ANN401 (as mpi4py)
        """Return the objects of all ranks, in rank order. Collective."""


class GridPart(NamedTuple):
    """The part of the global array that a rank has, and the grid that it is a part of.

    Attributes:
        dims: Number of ranks along each dimension; the last coordinate varies fastest from
            rank to rank.
        lengths: Elements of the part along each dimension.
        problem: Why this rank has none; empty if it has.
    """

    dims: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    problem: str = ""


def place_in_grid(
    comm: RankGroup, look: Callable[[], tuple[Sequence[int], Sequence[int]]]
) -> tuple[tuple[int, ...], Box]:
    """Return the shape of the whole array, and the box of this rank.

    Collective.

    Args:
        comm: The program's communicator.
        look: Returns the grid and this rank's lengths, as in `GridPart`; may raise.

    Raises:
        RegistrationError: On every rank, if ``look`` raised on a rank, or the parts fit no
            such grid.
    """
    try:
        dims, lengths = look()
        part = GridPart(tuple(map(index, dims)), tuple(map(index, lengths)))
    except Exception as error:  # other ranks wait: all learn of it, and all raise
        part = GridPart(problem=str(error))
    parts = [GridPart(*given) for given in comm.allgather(tuple(part))]
    problem = grid_fault(parts)
    if problem:
        raise RegistrationError(f"{problem}; no block was made on any rank")
    return _shape_and_box(parts, comm.rank)


def grid_fault(parts: Sequence[GridPart]) -> str:
    """Return why the parts of all ranks fit no grid, empty if they do. Pure.

    Args:
        parts: The part of each rank, in rank order.
    """
    first = parts[0]
    for rank, part in enumerate(parts):
        if part.problem:
            return f"rank {rank}: {part.problem}"
        if part.dims != first.dims:
            return (
                f"rank {rank} has a grid of {part.dims} ranks, rank 0 one of {first.dims}"
            )
        if len(part.lengths) != len(part.dims):
            return (
                f"rank {rank} has an array of {len(part.lengths)} dimensions, the grid "
                f"{part.dims} has {len(part.dims)}"
            )
    if min(first.dims, default=1) < 1 or prod(first.dims) != len(parts):
        return (
            f"a grid of {first.dims} ranks has {prod(first.dims)} places, there are "
            f"{len(parts)} ranks"
        )
    return _uneven_line(parts)


def _uneven_line(parts: Sequence[GridPart]) -> str:
    dims = parts[0].dims
    first_with: dict[tuple[int, int], int] = {}
    for rank, part in enumerate(parts):
        for dim, coordinate in enumerate(_coordinates(rank, dims)):
            other = first_with.setdefault((dim, coordinate), rank)
            ours, theirs = part.lengths[dim], parts[other].lengths[dim]
            if ours != theirs:
                return (
                    f"rank {rank} has {ours} elements along dimension {dim}, rank {other} "
                    f"has {theirs}: both have coordinate {coordinate} of it in the grid of "
                    f"{dims} ranks, and must have the same length"
                )
    return ""


def _shape_and_box(parts: Sequence[GridPart], rank: int) -> tuple[tuple[int, ...], Box]:
    dims = parts[0].dims
    lengths = [[0] * count for count in dims]
    for other, part in enumerate(parts):
        for dim, coordinate in enumerate(_coordinates(other, dims)):
            lengths[dim][coordinate] = part.lengths[dim]
    place = _coordinates(rank, dims)
    offset = tuple(sum(along[:at]) for along, at in zip(lengths, place, strict=True))
    return tuple(map(sum, lengths)), Box(offset, parts[rank].lengths)


def _coordinates(rank: int, dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(rank, dims))) if dims else ()
