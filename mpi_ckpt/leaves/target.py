# SPDX-License-Identifier: Apache-2.0
"""Provides the memory that receives a leaf."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.leaves.leaf import copy_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi_ckpt.leaves.leaf import Leaf, LeafSpec

__all__ = ["Target"]


class Target:
    """The memory that receives a leaf: its own, if that is contiguous host memory.

    Not collective. Not thread-safe.

    Args:
        spec: Spec of the leaf to receive.
        leaf: The live leaf to fill; None if the program has none.
    """

    def __init__(self, spec: LeafSpec, leaf: Leaf | None) -> None:
        self._nbytes = spec.nbytes
        self._leaf = leaf
        self._live: memoryview | None = None if leaf is None else leaf.buffer.view()
        self._private: bytearray | None = None
        parts: Any = None if leaf is None else leaf.buffer
        self._write_part: Callable[[int, memoryview], None] | None = None
        if getattr(parts, "takes_parts", False):
            self._write_part = parts.write_part

    @property
    def takes_parts(self) -> bool:
        """Whether `put` needs no private copy of the leaf, nor `finish`: on a device."""
        return self._write_part is not None

    def put(self, start: int, data: memoryview) -> None:
        """Store some of the bytes, from ``start`` on."""
        if self._write_part is not None:
            self._write_part(start, data)
        else:
            copy_bytes(data, self.memory()[start : start + len(data)])

    @property
    def is_private(self) -> bool:
        """Whether the memory is a private copy, which `finish` moves."""
        return self._live is None

    def memory(self) -> memoryview:
        """Return the bytes to fill; makes a private copy when first needed."""
        if self._live is not None:
            return self._live
        if self._private is None:
            self._private = bytearray(self._nbytes)
        return memoryview(self._private)

    def finish(self) -> None:
        """Move a private copy into the live leaf, and drop the copy.

        Does nothing for a leaf on a device whose bytes were `put` there.
        """
        is_there = self._write_part is not None and self._private is None
        if self._live is None and self._leaf is not None and not is_there:
            self._leaf.buffer.write(self.memory())
        self._private = None
