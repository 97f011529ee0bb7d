# SPDX-License-Identifier: Apache-2.0
"""Defines a box: a range of indices in each dimension of a global array. Pure."""

from __future__ import annotations

from math import prod
from typing import NamedTuple


# A named tuple, not a dataclass: thousands are made at a time, five times as fast.
class Box(NamedTuple):
    """A range of indices in each dimension of a global array.

    Attributes:
        offset: First index of each dimension, in elements.
        shape: Length of each dimension, in elements; ``()`` is the box of a scalar.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        """One past the last index of each dimension."""
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """Return the box of a whole array. Not collective. Thread-safe."""
        return cls((0,) * len(shape), shape)

    def __str__(self) -> str:
        ranges = [f"{o}:{e}" for o, e in zip(self.offset, self.end, strict=True)]
        return f"[{', '.join(ranges)}]"
