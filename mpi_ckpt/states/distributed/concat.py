# SPDX-License-Identifier: Apache-2.0
"""Defines the state of rows that the ranks share out, such as particles."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import RegistrationError, RestoreError, StageError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, Tile
from mpi_ckpt.leaves.tiles import cut_leaf
from mpi_ckpt.state import Arrival, Capture, LeafState
from mpi_ckpt.states.arrays import CONCATENATED
from mpi_ckpt.states.distributed.blocks import memory_problem
from mpi_ckpt.states.distributed.sharded import require_arrays
from mpi_ckpt.states.leaf_values import memory_leaf
from mpi_ckpt.states.mismatch import raise_mismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaves.leaf import TileBuffer
    from mpi_ckpt.state import Structure

    Column = NDArray[Any] | torch.Tensor
    Columns = Mapping[str, Column]

__all__ = ["ConcatState"]

_CHUNK_ROWS = 1 << 16
"""Rows for which a program's function is called at a time."""


class ConcatState(LeafState):
    """Columns of rows of which each rank has any number, such as particles.

    The file has the rows of all ranks, in rank order. A restore deals them out evenly in
    this order, to any number of ranks, or by ``route``. A rank without rows has all columns
    too, with zero rows.

    Args:
        name: As for `mpi_ckpt.State`.
        arrays: Name of each column -> NumPy array or torch tensor; its rows are along the
            first dimension, as many as in each other column of the rank. Ranks have the
            same columns, with the same dtypes and the same shapes but for the rows. A
            function that returns them is called at each save and restore.
        route: Function that a restore calls for the arrived rows, in chunks: it takes the
            columns of a chunk, which it must not change, and returns the rank of each row
            as an array of integers.
            Rows reach their ranks in the order of the file. None: rank r of m gets the rows
            from N*r//m up to N*(r+1)//m.

    Attributes:
        arrays: The columns. Replace entries freely between saves. A restore replaces all by
            new arrays. With a function: those of the last save or restore; after a restore
            the program takes them over from here.
        route: As given.
        arriving: The columns that a restore is filling; the engine's.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal, or a column
            is no array with rows.
    """

    def __init__(
        self,
        name: str,
        arrays: Columns | Callable[[], Columns],
        *,
        route: Callable[[Columns], NDArray[np.integer[Any]]] | None = None,
    ) -> None:
        # No rank has a replica of a row: there is nothing to make equal.
        super().__init__(name, sync="none")
        self._asked = arrays if callable(arrays) else None
        self.arrays: dict[str, Column] = {} if callable(arrays) else dict(arrays)
        self.route = route
        self.arriving: dict[str, Column] = {}
        self._rank, self._size = 0, 1
        problems = _column_problems(self.arrays)
        if problems:
            raise RegistrationError(f"state {name!r}: {'; '.join(problems)}")

    def bind(self, comm: Communicator) -> None:
        """See `LeafState`. Not collective."""
        self._rank, self._size = comm.rank, comm.size

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        leaves, problems = self._look()
        problems += _uneven_columns(leaves)
        if problems:
            raise StageError(
                f"state {self.name!r} cannot be saved:\n    " + "\n    ".join(problems),
                problems=problems,
            )
        return Capture(CONCATENATED, [_cut(leaf, 0, leaf.spec.shape) for leaf in leaves])

    def prepare(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Arrival:
        """See `LeafState`. Not collective.

        A column that was not saved is always a mismatch: its rows would not match the
        others'.
        """
        require_arrays(self.name, structure)
        leaves, problems = self._look()
        problems += _column_mismatches(leaves, specs, strict=strict)
        raise_mismatch(self.name, problems)
        known = {leaf.spec.name for leaf in leaves}
        rows = next((spec.shape[0] for spec in specs if spec.name in known), 0)
        first = rows * self._rank // self._size
        made = self.make_columns(rows * (self._rank + 1) // self._size - first)
        self.arriving = made
        targets = [
            _cut(memory_leaf(spec.name, made[spec.name]), first, spec.shape)
            if spec.name in known
            else None
            for spec in specs
        ]

        def adopt() -> None:
            self.arrays, self.arriving = self.arriving, {}

        unexpected = tuple(spec.name for spec in specs if spec.name not in known)
        return Arrival(targets, adopt, unexpected=unexpected)

    def make_columns(self, rows: int) -> dict[str, Column]:
        """Make empty columns like the live ones. Not collective.

        Args:
            rows: Number of rows.

        Returns:
            Arrays of the same kind, dtype and device, in C order.
        """
        return {key: _like(column, rows) for key, column in self.arrays.items()}

    def routed(self, columns: Columns) -> NDArray[np.intp]:
        """Return the rank of each row, as ``route`` decides.

        Not collective. Called by the engine for rows that have arrived, if there is a
        ``route``. The function is called for runs of at most 65,536 rows, never for none.

        Args:
            columns: The arrived columns.

        Returns:
            The ranks, of shape (rows,).

        Raises:
            RestoreError: On the calling rank, if the function does not return a rank for
                each row.
        """
        assert self.route is not None
        rows = min((len(column) for column in columns.values()), default=0)
        ranks = np.empty(rows, np.intp)
        for start in range(0, rows, _CHUNK_ROWS):
            end = min(start + _CHUNK_ROWS, rows)
            chunk = {key: column[start:end] for key, column in columns.items()}
            # The memory of the rows that are being restored: a function that wraps
            # positions in place would change them unseen.
            before = _digests_of(chunk)
            with concerning("route()"):
                found = self.route(dict(chunk))
            ranks[start:end] = self._checked(found, start, end)
            after = _digests_of(chunk)
            changed = [key for key in after if after[key] != before[key]]
            if changed:
                raise RestoreError(
                    f"state {self.name!r}: route has changed {', '.join(changed)} in rows "
                    f"{start} to {end - 1}: let it work on a copy"
                )
        return ranks

    def _checked(self, found: object, start: int, end: int) -> NDArray[np.integer[Any]]:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(found, torch.Tensor):
            found = found.detach().cpu().numpy()
        ranks = np.asarray(found)
        if ranks.shape != (end - start,) or not np.issubdtype(ranks.dtype, np.integer):
            raise RestoreError(
                f"state {self.name!r}: route returned {ranks.dtype} of shape {ranks.shape} "
                f"for rows {start} to {end - 1}, expected an integer for each of these "
                f"{end - start} rows"
            )
        outside = np.flatnonzero((ranks < 0) | (ranks >= self._size))
        if len(outside):
            at = int(outside[0])
            raise RestoreError(
                f"state {self.name!r}: route sends row {start + at} of this rank to rank "
                f"{int(ranks[at])}, expected 0 to {self._size - 1}"
            )
        return ranks

    def _look(self) -> tuple[list[Leaf], list[str]]:
        """Return the columns as whole leaves, by name, and why some are no columns."""
        if self._asked is not None:
            self.arrays = dict(self._asked())
        problems = _column_problems(self.arrays)
        if problems:
            return [], problems
        # Ranks may list their columns in any order.
        return [memory_leaf(key, self.arrays[key]) for key in sorted(self.arrays)], []


def _digests_of(columns: Columns) -> dict[str, bytes]:
    leaves = [memory_leaf(key, column) for key, column in columns.items()]
    return {leaf.spec.name: digest_bytes(leaf.buffer.read()) for leaf in leaves}


def _column_problems(arrays: Columns) -> list[str]:
    problems = []
    for key, value in arrays.items():
        problem = memory_problem(value)
        if not problem and not value.shape:
            problem = "has no rows: give it a first dimension"
        if problem:
            problems.append(f"{key} {problem}")
    return problems


def _uneven_columns(leaves: Sequence[Leaf]) -> list[str]:
    return [
        f"{leaf.spec.name} has {leaf.spec.shape[0]} rows, {leaves[0].spec.name} has "
        f"{leaves[0].spec.shape[0]}: all columns of a rank have the same rows"
        for leaf in leaves
        if leaf.spec.shape[0] != leaves[0].spec.shape[0]
    ]


def _column_mismatches(
    leaves: Sequence[Leaf], specs: Sequence[LeafSpec], *, strict: bool
) -> list[str]:
    saved = {spec.name: spec for spec in specs}
    live = {leaf.spec.name: leaf.spec for leaf in leaves}
    problems = [
        f"{spec} is saved, the program has {live[spec.name]}: only the rows may differ"
        for spec in specs
        if spec.name in live
        and (not spec.shape or _row_form(spec) != _row_form(live[spec.name]))
    ]
    problems += [
        f"{spec} is in the program, not in the checkpoint"
        for name, spec in live.items()
        if name not in saved
    ]
    problems += [
        f"{spec} is saved, the program has no such column"
        for spec in specs
        if strict and spec.name not in live
    ]
    common = [spec for spec in specs if spec.name in live and spec.shape]
    problems += [
        f"{spec} is saved with other rows than {common[0]}"
        for spec in common
        if spec.shape[0] != common[0].shape[0]
    ]
    return problems


def _row_form(spec: LeafSpec) -> tuple[str, tuple[int, ...]]:
    return spec.dtype, spec.shape[1:]


def _cut(leaf: Leaf, first: int, shape: tuple[int, ...]) -> Leaf:
    """Return a leaf of this rank's rows as rows of a cut leaf, from a first row on."""
    own = leaf.spec.shape
    box = Box((first, *[0] * (len(own) - 1)), own)
    spec = LeafSpec(leaf.spec.name, leaf.spec.dtype, shape)
    return cut_leaf(
        spec, [Tile(box, cast("TileBuffer", leaf.buffer))], is_concatenated=True
    )


def _like(column: Any, rows: int) -> Any:  # noqa: ANN401
    shape = (rows, *column.shape[1:])
    if isinstance(column, np.ndarray):
        made = np.empty(shape, column.dtype)
        return made.view(np.recarray) if type(column) is np.recarray else made
    from mpi_ckpt.states.buffers.tensor_bytes import ordinary

    with ordinary():
        return column.detach().new_empty(shape)
