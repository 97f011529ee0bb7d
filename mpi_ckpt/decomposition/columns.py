# SPDX-License-Identifier: Apache-2.0
"""Provides tables of columns: arrays of NumPy of equal length. Pure."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

AnyColumns = TypeVar("AnyColumns", bound="Columns")


class Columns:
    """Base of data classes whose fields are columns, or tables of such. Not collective."""

    __slots__ = ()

    def rows(self: AnyColumns, rows: NDArray[np.int64] | slice) -> AnyColumns:
        """Return some rows, in any order."""
        return type(self)(
            *(
                value.rows(rows) if isinstance(value, Columns) else value[rows]
                for _, value in _values(self)
            )
        )

    def named(self, prefix: str = "") -> dict[str, NDArray[np.int64]]:
        """Return all columns by name; those of inner tables as ``outer.inner``."""
        columns: dict[str, NDArray[np.int64]] = {}
        for name, value in _values(self):
            if isinstance(value, Columns):
                columns |= value.named(f"{prefix}{name}.")
            else:
                columns[prefix + name] = value
        return columns


def _values(table: Any) -> list[tuple[str, Any]]:  # noqa: ANN401 (fields() takes any)
    return [(field.name, getattr(table, field.name)) for field in fields(table)]


def encode_columns(columns: Mapping[str, NDArray[np.int64]], turns: int) -> bytes:
    """Return columns and a number, none of them negative, as bytes. Not collective."""
    narrow = {name: narrowed(column) for name, column in columns.items()}
    described = [[name, c.dtype.str, list(c.shape)] for name, c in narrow.items()]
    head = json.dumps([turns, described]).encode()
    parts = [len(head).to_bytes(8, "little"), head, *(c.tobytes() for c in narrow.values())]
    return b"".join(parts)


def decode_columns(
    data: bytes | bytearray | memoryview,
) -> tuple[dict[str, NDArray[np.int64]], int]:
    """Return what `encode_columns` made bytes of. Not collective. Thread-safe."""
    position = 8 + int.from_bytes(data[:8], "little")
    turns, described = json.loads(bytes(data[8:position]))
    columns = {}
    for name, dtype, shape in described:
        count = int(np.prod(shape, dtype=np.int64))
        column = np.frombuffer(data, dtype, count, position)
        position += column.nbytes
        columns[name] = column.reshape(shape).astype(np.int64)
    return columns, turns


def narrowed(column: NDArray[np.int64]) -> NDArray[Any]:
    """Return a column without negative numbers in its smallest type. Not collective."""
    return column.astype(np.min_scalar_type(int(column.max(initial=0))))


def ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of ranges, one range behind the other. Not collective.

    Args:
        starts: First number of each range.
        counts: Length of each range.
    """
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) + (starts - (ends - counts)).repeat(counts)
