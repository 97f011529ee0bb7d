# SPDX-License-Identifier: Apache-2.0
"""Finds the boxes of a tensor that a rank of a device mesh has. Pure.

A formula for offsets, as torch's own, is wrong for uneven parts that are cut twice along
one dimension. Here the indices themselves are cut, as runs of successive indices, in the
order in which the tensor was cut.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from mpi_ckpt.decomposition.boxes import Box

if TYPE_CHECKING:
    from collections.abc import Sequence

Runs = tuple[tuple[int, int], ...]
"""Start and length of runs of indices."""


class MeshCut(NamedTuple):
    """The cut of a tensor dimension along a dimension of a mesh.

    Attributes:
        parts: Number of parts.
        part: The part of this rank.
        strides: Number of pieces into which the dimension had been cut before; 1 for an
            ordinary cut.
    """

    parts: int
    part: int
    strides: int = 1


class MeshPiece(NamedTuple):
    """A box of the whole tensor, and where it lies in a rank's local tensor.

    Attributes:
        box: The box, in the indices of the whole tensor.
        place: Offset of each dimension in the local tensor.
    """

    box: Box
    place: tuple[int, ...]


@lru_cache(maxsize=4096)
def mesh_pieces(
    shape: tuple[int, ...], cuts: tuple[tuple[MeshCut, ...], ...]
) -> tuple[tuple[int, ...], tuple[MeshPiece, ...]]:
    """Return the local shape, and the boxes that the local tensor is made of. Pure.

    Args:
        shape: Shape of the whole tensor.
        cuts: The cuts of each dimension, in the order of the mesh's dimensions.

    Returns:
        The local shape; the pieces with at least one element, in C order.

    Raises:
        ValueError: If a strided cut does not say how its pieces were made.
    """
    along = [cut_runs(length, of) for length, of in zip(shape, cuts, strict=True)]
    local = tuple(sum(length for _, length in runs) for runs in along)
    placed = [list(_placed(runs)) for runs in along]
    pieces = [
        MeshPiece(
            Box(tuple(run[0] for run in runs), tuple(run[1] for run in runs)),
            tuple(run[2] for run in runs),
        )
        for runs in product(*placed)
    ]
    return local, tuple(pieces)


def cut_runs(length: int, cuts: Sequence[MeshCut]) -> Runs:
    """Return the indices along a dimension that are a rank's. Pure.

    Ordinary cuts are made from left to right, each as ``torch.chunk`` does. A strided cut
    (FSDP of a tensor that is tensor-parallel already) was made after those to its right.
    Alone, it cuts each of its pieces, and joins this rank's parts of them.

    Args:
        length: Number of indices.
        cuts: The cuts, in the order of the mesh's dimensions.

    Raises:
        ValueError: If the pieces of a strided cut are not those of the cuts to its right.
    """
    return _merged(_cut(((0, length),), tuple(cuts)))


def _cut(runs: Runs, cuts: tuple[MeshCut, ...]) -> Runs:
    if not cuts:
        return runs
    first, rest = cuts[0], cuts[1:]
    if first.strides == 1:
        return _cut(_part(runs, first.parts, first.part), rest)
    if not rest:
        pieces = [_part(runs, first.strides, piece) for piece in range(first.strides)]
        return tuple(
            run for piece in pieces for run in _part(piece, first.parts, first.part)
        )
    before = 1
    for cut in rest:
        before *= cut.parts
    if before != first.strides:
        raise ValueError(
            f"a strided cut of {first.strides} pieces, after cuts into {before} parts"
        )
    return _part(_cut(runs, rest), first.parts, first.part)


def _part(runs: Runs, parts: int, part: int) -> Runs:
    """Return a part of the indices, as ``torch.chunk`` makes them."""
    total = sum(length for _, length in runs)
    size = -(-total // parts)
    first, end = min(part * size, total), min((part + 1) * size, total)
    kept = []
    passed = 0
    for start, length in runs:
        low, high = max(first - passed, 0), min(end - passed, length)
        if low < high:
            kept.append((start + low, high - low))
        passed += length
    return tuple(kept)


def _merged(runs: Runs) -> Runs:
    merged: list[tuple[int, int]] = []
    for start, length in runs:
        if merged and sum(merged[-1]) == start:
            merged[-1] = merged[-1][0], merged[-1][1] + length
        elif length:
            merged.append((start, length))
    return tuple(merged)


def _placed(runs: Runs) -> list[tuple[int, int, int]]:
    """Return start, length and local start of each run."""
    placed = []
    at = 0
    for start, length in runs:
        placed.append((start, length, at))
        at += length
    return placed
