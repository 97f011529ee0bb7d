# SPDX-License-Identifier: Apache-2.0
"""Defines a block: this rank's box of a global array, in an array of the program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mpi_ckpt.decomposition.boxes import Box, grow, wrapped
from mpi_ckpt.errors import RegistrationError, StageError
from mpi_ckpt.leaves.leaf import LeafSpec, Tile
from mpi_ckpt.states.distributed.grids import place_in_grid
from mpi_ckpt.states.leaf_values import is_leaf_value, memory_leaf, part_of, takes_bytes
from mpi_ckpt.states.wrappers import is_sharded

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from mpi_ckpt.leaves.leaf import TileBuffer
    from mpi_ckpt.states.distributed.grids import RankGroup

__all__ = ["Block"]


# Other subclasses hold more than numbers (a unit, a mask), which the file would lack.
_ARRAYS = (np.ndarray, np.memmap, np.recarray)


def memory_problem(value: object) -> str:
    """Return why a value is no array in memory of its own, empty if it is.

    Not collective.

    Args:
        value: Anything.

    Returns:
        The rest of a sentence about the value.
    """
    if isinstance(value, np.generic):
        return "is a NumPy scalar: bytes cannot be put into it; give an array"
    is_array = isinstance(value, np.ndarray)
    if not is_leaf_value(value) or (is_array and type(value) not in _ARRAYS):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return (
            f"is a {kind.removeprefix('builtins.')}, expected a NumPy array or a torch "
            "tensor: give np.asarray() of it if that shares its memory"
        )
    if is_sharded(value):
        return (
            f"is a {type(value).__name__}, which knows its own place in the whole: give it "
            "to a ModuleState, an OptimizerState, a TrainState or an ObjectState as it is"
        )
    try:
        memory_leaf("it", value)
    except StageError as error:
        return f"has no plain memory: {error}"
    return ""


Ghosts = int | Sequence[int | tuple[int, int]]


@dataclass(frozen=True, slots=True, init=False, eq=False)
class Block:
    """This rank's box of a global array, in an array that may have ghost cells around it.

    Not collective. A save writes the interior, never the ghost cells. A restore fills both:
    ghost cells inside the domain get the values of the ranks that own them, those outside
    keep theirs. Physical boundary cells that must be saved are part of ``shape``, and of
    the interior of the blocks at the boundary.

    Args:
        array: NumPy array or torch tensor of any dtype but objects, of any layout, on any
            device; with its ghost cells.
        shape: Shape of the whole array, in elements, without any ghost cells.
        offset: Index of the first element of the interior in the whole array.
        ghosts: Number of ghost cells on each side; or a number, or a pair of low and high
            side, for each dimension.
        periodic: Whether ghost cells outside the domain are those of the opposite side;
            also for each dimension.

    Attributes:
        array, shape, offset: As given.
        ghosts: Ghost cells on the low and on the high side of each dimension.
        periodic: For each dimension.

    Raises:
        RegistrationError: On the calling rank, if the array has no such interior in the
            whole array, or bytes cannot be put back into it.
    """

    array: NDArray[Any] | torch.Tensor = field(repr=False)
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    ghosts: tuple[tuple[int, int], ...]
    periodic: tuple[bool, ...]

    def __init__(
        self,
        array: NDArray[Any] | torch.Tensor,
        *,
        shape: Sequence[int],
        offset: Sequence[int],
        ghosts: Ghosts = 0,
        periodic: bool | Sequence[bool] = False,
    ) -> None:
        _require_memory(array)
        for name, value in {
            "array": array,
            "shape": _numbers(array, "shape", shape),
            "offset": _numbers(array, "offset", offset),
            "ghosts": _ghosts(array, ghosts),
            "periodic": tuple(map(bool, _each(array, "periodic", periodic))),
        }.items():
            object.__setattr__(self, name, value)
        self._require_interior()

    @classmethod
    def rows(
        cls,
        array: NDArray[Any] | torch.Tensor,
        comm: RankGroup,
        *,
        ghosts: int | tuple[int, int] | Sequence[tuple[int, int]] = 0,
        periodic: bool | Sequence[bool] = False,
    ) -> Block:
        """Make the block of this rank's rows: the ranks' rows follow in rank order.

        Collective.

        Args:
            array: This rank's rows, any number, with their ghost cells.
            comm: The program's mpi4py communicator.
            ghosts: Ghost rows before and after; or their two numbers; or the two numbers
                of each dimension.
            periodic: As for `Block`.

        Raises:
            RegistrationError: On every rank, if it is no block on a rank, or the rows of
                two ranks differ in shape.
        """
        dims = len(getattr(array, "shape", ()))
        grid = (comm.size, *[1] * (dims - 1)) if dims else ()
        around = _row_ghosts(ghosts, dims)
        return cls._placed(array, grid, comm, around, periodic)

    @classmethod
    def grid(
        cls,
        array: NDArray[Any] | torch.Tensor,
        dims: Sequence[int],
        comm: RankGroup,
        *,
        ghosts: Ghosts = 0,
        periodic: bool | Sequence[bool] = False,
    ) -> Block:
        """Make the block of this rank in a grid of ranks, the last dimension fastest.

        Collective. Parts may be uneven, but ranks that have a coordinate in common have the
        same length in its dimension.

        Args:
            array: This rank's part, with its ghost cells.
            dims: Number of ranks along each dimension of the array; their product is the
                number of ranks.
            comm: The program's mpi4py communicator.
            ghosts: As for `Block`.
            periodic: As for `Block`.

        Raises:
            RegistrationError: On every rank, if it is no block on a rank, or the parts fit
                no such grid.
        """
        return cls._placed(array, dims, comm, ghosts, periodic)

    @classmethod
    def _placed(
        cls,
        array: NDArray[Any] | torch.Tensor,
        dims: Sequence[int],
        comm: RankGroup,
        ghosts: Ghosts,
        periodic: bool | Sequence[bool],
    ) -> Block:
        def look() -> tuple[Sequence[int], Sequence[int]]:
            _require_memory(array)
            if not array.shape:
                raise _refusal(array, "it has no dimension to cut")
            around = _ghosts(array, ghosts)
            own = _interior_shape(array.shape, around)
            # Made for its checks, as if this rank had the whole array.
            cls(array, shape=own, offset=[0] * len(own), ghosts=around, periodic=periodic)
            return dims, own

        shape, box = place_in_grid(comm, look)
        return cls(array, shape=shape, offset=box.offset, ghosts=ghosts, periodic=periodic)

    @property
    def box(self) -> Box:
        """The interior, in the indices of the whole array."""
        return Box(self.offset, _interior_shape(self.array.shape, self.ghosts))

    def spec(self, name: str) -> LeafSpec:
        """Describe the whole array. Not collective.

        Args:
            name: Name of the leaf.
        """
        return LeafSpec(name, memory_leaf(name, self.array).spec.dtype, self.shape)

    def interior(self) -> list[Tile]:
        """Return the tile that a save writes; none if it has no element. Not collective."""
        box = self.box
        ranges = zip(box.shape, self.ghosts, strict=True)
        place = [slice(low, low + length) for length, (low, _) in ranges]
        return [self._tile(box, place)] if box.size else []

    def targets(self) -> list[Tile]:
        """Return the tiles that a restore fills, with ghost cells. Not collective."""
        grown = grow(self.box, self.ghosts)
        return [
            self._tile(box, [slice(o, o + n) for o, n in zip(at, box.shape, strict=True)])
            for box, at in wrapped(grown, self.shape, self.periodic)
        ]

    def _tile(self, box: Box, place: Sequence[slice]) -> Tile:
        leaf = memory_leaf("", part_of(self.array, place))
        return Tile(box, cast("TileBuffer", leaf.buffer))

    def _require_interior(self) -> None:
        box = self.box
        if min(box.shape, default=0) < 0:
            raise _refusal(
                self.array, f"it has no room for {self.ghosts} ghost cells (low, high)"
            )
        if any(o < 0 for o in box.offset) or any(
            end > length for end, length in zip(box.end, self.shape, strict=True)
        ):
            raise _refusal(
                self.array,
                f"its interior {box} does not lie in the whole, {Box.whole(self.shape)}",
            )


def _interior_shape(
    shape: Sequence[int], ghosts: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    sides = zip(shape, ghosts, strict=True)
    return tuple(int(length) - low - high for length, (low, high) in sides)


def _require_memory(array: Any) -> None:  # noqa: ANN401
    problem = memory_problem(array)
    if problem:
        raise RegistrationError(f"the array of a block {problem}")
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise _refusal(array, "it is read-only: nothing could be put back into it")
    if not takes_bytes(array):
        raise _refusal(
            array,
            "it overlaps itself in memory, as after np.broadcast_to() or expand(): bytes "
            "cannot be put back into it; give a copy",
        )


def _numbers(array: Any, what: str, given: Sequence[int]) -> tuple[int, ...]:  # noqa: ANN401
    try:
        return tuple(map(index, _each(array, what, list(given))))
    except TypeError:
        raise _refusal(array, f"{what} is {given!r}, expected whole numbers") from None


def _ghosts(array: Any, given: Ghosts) -> tuple[tuple[int, int], ...]:  # noqa: ANN401
    sides: list[tuple[int, int]] = []
    for both in _each(array, "ghosts", given):
        pair = (both, both) if _is_number(both) else both
        try:
            low, high = map(index, pair)
        except (TypeError, ValueError):
            low, high = -1, -1
        if low < 0 or high < 0:
            raise _refusal(
                array,
                f"ghosts is {given!r}, expected a number of cells, or for each dimension a "
                "number or a pair (low, high)",
            )
        sides.append((low, high))
    return tuple(sides)


def _row_ghosts(given: Any, dims: int) -> Any:  # noqa: ANN401 (checked with the block)
    """Return the ghost cells of each dimension, from those of the rows alone."""
    if _is_number(given):
        given = (given, given)
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(map(_is_number, given)):
        return [tuple(given), *[(0, 0)] * (dims - 1)][:dims]
    return given


def _each(array: Any, what: str, given: Any) -> list[Any]:  # noqa: ANN401
    """Return a value for each dimension: the given ones, or one value for all."""
    dims = len(array.shape)
    values = list(given) if isinstance(given, (tuple, list)) else [given] * dims
    if len(values) != dims:
        raise _refusal(
            array, f"{what} is {given!r}, expected a value for each of {dims} dimensions"
        )
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, (int, np.integer))


def _refusal(array: Any, problem: str) -> RegistrationError:  # noqa: ANN401
    return RegistrationError(
        f"a block of an array of shape {tuple(array.shape)}, {array.dtype}: {problem}"
    )
