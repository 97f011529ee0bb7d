# SPDX-License-Identifier: Apache-2.0
"""Defines a leaf: one named run of typed bytes in a state, which states give to storage."""

from __future__ import annotations

import json
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from mpi_ckpt.leaves import dtypes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from mpi_ckpt.decomposition.boxes import Box

__all__ = [
    *("Buffer", "Form", "Gate", "Leaf", "LeafSpec", "MemoryBuffer", "Place"),
    *("Tile", "TileBuffer", "copy_bytes", "known_form"),
]

# Copies of fewer bytes are done before NumPy has made an array of them.
_SMALL_BYTES = 32 << 10


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """The name, type and shape of a leaf, without its bytes.

    Attributes:
        name: Unique within its state.
        dtype: Element type, a name of `mpi_ckpt.dtypes`.
        shape: Shape in elements; ``()`` is a scalar.
        is_cut: Of a saved leaf: whether it was saved cut over the ranks. Not compared.
        nbytes: Size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_cut: bool = field(default=False, repr=False, compare=False)
    nbytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", dtypes.nbytes(self.dtype, self.shape))

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"

    def to_json(self) -> list[Any]:
        """Return the spec as JSON values. Not collective. Thread-safe."""
        return [self.name, self.dtype, self.shape]

    @classmethod
    def from_json(cls, values: Sequence[Any], *, is_cut: bool = False) -> LeafSpec:
        """Return the spec that `to_json` encoded. Not collective. Thread-safe."""
        name, dtype, shape = values
        return cls(name, dtype, tuple(shape), is_cut)


Kind: TypeAlias = "tuple[str, tuple[int, ...]]"
"""Dtype and shape of a leaf."""


class Form:
    """The specs of a state's leaves, and values computed from them alone. Thread-safe.

    A state keeps its form from save to save as long as the form stays the same, and so
    keeps the computed values: with thousands of leaves that is most of the work.

    Args:
        specs: The specs, in the order of the leaves.
    """

    def __init__(self, specs: Iterable[LeafSpec]) -> None:
        self.specs = tuple(specs)

    def pick(self, numbers: Sequence[int]) -> Form:
        """Return the form of some of the leaves. Not collective."""
        if len(numbers) == len(self.specs):
            return self
        return Form([self.specs[number] for number in numbers])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the leaves."""
        return tuple([spec.name for spec in self.specs])

    @cached_property
    def kinds(self) -> tuple[tuple[Kind, ...], tuple[int, ...]]:
        """The kinds of leaves that there are, and for each leaf the index of its kind."""
        numbers: dict[Kind, int] = {}
        kinds = [(spec.dtype, spec.shape) for spec in self.specs]
        found = [numbers.setdefault(kind, len(numbers)) for kind in kinds]
        return tuple(numbers), tuple(found)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """The bytes of each leaf."""
        sizes = [spec.nbytes for spec in self.specs]
        return np.array(sizes, np.int64)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(spec.nbytes for spec in self.specs)

    @cached_property
    def text(self) -> bytes:
        """A text that is equal for equal specs, and different for different ones."""
        return json.dumps([spec.to_json() for spec in self.specs]).encode()


@lru_cache(maxsize=4)
def known_form(
    names: tuple[str, ...], kinds: tuple[Kind, ...], numbers: tuple[int, ...]
) -> Form:
    """Return the form of leaves from columns; usually the previous object.

    Not collective. Thread-safe. Most generations that a job reads have one form.

    Args:
        names: The name of each leaf.
        kinds: The kinds of leaves that there are.
        numbers: For each leaf the index of its kind.
    """
    return Form(
        [
            LeafSpec(name, *kinds[number])
            for name, number in zip(names, numbers, strict=True)
        ]
    )


class Buffer(Protocol):
    """The memory of a leaf's bytes: host memory, a strided tensor, a device."""

    def view(self) -> memoryview | None:
        """Return the live bytes, writable, if they are contiguous host memory."""

    def read(self) -> memoryview:
        """Return the bytes: the live bytes if `view` returns them, else a private copy."""

    def copy_to(self, target: memoryview) -> None:
        """Copy the bytes to host memory of the same length, in one go."""

    def write(self, data: memoryview) -> None:
        """Replace the bytes by ``data``, of the same length."""

    def stamp(self) -> int:
        """Return a number that changes with each noticed change of the bytes."""

    def place(self) -> Place | None:
        """Return which live memory it is; None for private memory."""

    def span(self) -> tuple[int, int]:
        """Return the span of `place`, without making the place; two zeros for none."""


class TileBuffer(Buffer, Protocol):
    """The memory of a tile's elements, of which boxes can be taken."""

    def part(self, index: tuple[slice, ...]) -> Buffer:
        """Return the memory of a box of the elements, in C order of that box.

        Args:
            index: A slice for each dimension.
        """

    def host_bytes(self) -> NDArray[np.uint8] | None:
        """Return the live bytes of each element, little end first.

        Returns:
            A writable array of the shape of the tile, with one more dimension for the
            bytes of an element, which follow one another; other strides are those of the
            memory. None if it is not host memory in that order.
        """


@dataclass(frozen=True, slots=True)
class Tile:
    """A box of a leaf that is cut over the ranks, and the memory of its elements.

    Attributes:
        box: The box, in the indices of the whole leaf.
        buffer: Its elements, in C order of the box.
    """

    box: Box
    buffer: TileBuffer


class Place(NamedTuple):
    """Where elements lie in memory: address, sizes and strides.

    Attributes:
        address: Address of the first element, in bytes, on any device.
        itemsize: Bytes of an element.
        shape: Shape in elements.
        strides: Strides in bytes.
        swapped: Bytes of each number of an element, if they lie in the opposite order of a
            leaf's bytes; 0 if not.
        flipped: The bits of an element, in hex, that memory holds inverted, as those of a
            view that negates when it is read; empty for none.
    """

    address: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    swapped: int = 0
    flipped: str = ""

    @property
    def span(self) -> tuple[int, int]:
        """The first byte, and one past the last byte; equal if there is no element."""
        if 0 in self.shape:
            return self.address, self.address
        reach = [step * (n - 1) for n, step in zip(self.shape, self.strides, strict=True)]
        start = self.address + sum(offset for offset in reach if offset < 0)
        last = self.address + sum(offset for offset in reach if offset > 0)
        return start, last + self.itemsize


class Gate:
    """Makes code that is about to change tensors wait until they are copied.

    Main thread only. A future ends whether the copy succeeds or fails, so no code waits for
    ever.

    Attributes:
        bypass: Returns what may change the tensors without passing the gate; None if
            nothing is known that may.
    """

    def __init__(self) -> None:
        self._copy: Future[None] | None = None
        self.bypass: Callable[[], str | None] = lambda: None

    def hold(self, copy: Future[None]) -> None:
        """Let `wait` wait for a copy."""
        self._copy = copy

    def wait(self) -> None:
        """Return when the tensors may change; the error of a copy is not raised here."""
        copy, self._copy = self._copy, None
        if copy is not None:
            wait([copy])


@dataclass(frozen=True, slots=True)
class Leaf:
    """One named tensor, array or blob, and where its bytes live.

    A leaf is whole, with the same bytes on every rank, or cut: each rank has some tiles of
    it, or none.

    Attributes:
        spec: Its name, type and shape; of a cut leaf those of the whole.
        buffer: The memory of its bytes; of a cut leaf none that can be read.
        gate: Gate that all code which changes the leaf passes first. None if there is no
            such promise: an asynchronous save must then copy the leaf at once.
        tiles: This rank's tiles of a cut leaf; None for a whole leaf. In a save two tiles
            of any ranks are disjoint or have the same box; in a restore they are what this
            rank receives, and may overlap.
        is_concatenated: Whether the leaf is the tiles of all ranks, one a rank, joined
            along the first dimension in rank order. A save then finds the whole shape and
            the tiles' offsets: the spec and the box have this rank's rows, from 0.
    """

    spec: LeafSpec
    buffer: Buffer
    gate: Gate | None = None
    tiles: tuple[Tile, ...] | None = None
    is_concatenated: bool = False

    def under(self, prefix: str) -> Leaf:
        """Return the same leaf under a longer name. Not collective. Thread-safe."""
        spec = self.spec
        # Not dataclasses.replace, which takes ten times as long; there may be many leaves.
        longer = LeafSpec(prefix + spec.name, spec.dtype, spec.shape)
        return Leaf(longer, self.buffer, self.gate, self.tiles, self.is_concatenated)

    def behind(self, gate: Gate | None) -> Leaf:
        """Return the same leaf behind a gate. Not collective. Thread-safe."""
        if gate is self.gate:
            return self
        return Leaf(self.spec, self.buffer, gate, self.tiles, self.is_concatenated)


def copy_bytes(source: memoryview, target: memoryview) -> None:
    """Copy bytes at the speed of memory, without blocking other threads for long."""
    if len(source) < _SMALL_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


class MemoryBuffer:
    """Private host memory."""

    def __init__(self, memory: memoryview | bytes | bytearray) -> None:
        self._memory = memoryview(memory)

    @classmethod
    def empty(cls, nbytes: int) -> MemoryBuffer:
        """Make a buffer to fill. Not collective.

        The system provides the memory as it is filled: a claimed size proves nothing.
        """
        return cls(np.zeros(nbytes, np.uint8).data)

    def view(self) -> memoryview | None:
        """Return the memory itself, if it is writable. Not collective."""
        return None if self._memory.readonly else self._memory

    def read(self) -> memoryview:
        """Return the memory itself. Not collective."""
        return self._memory

    @staticmethod
    def read_all(buffers: Sequence[MemoryBuffer]) -> Sequence[memoryview]:
        """Return the memory of each buffer. Not collective."""
        return [buffer._memory for buffer in buffers]  # noqa: SLF001 (its own)

    def copy_to(self, target: memoryview) -> None:
        """Copy the memory. Not collective."""
        copy_bytes(self._memory, target)

    def write(self, data: memoryview) -> None:
        """Replace the bytes. Not collective."""
        copy_bytes(data, self._memory)

    def stamp(self) -> int:
        """Return a constant: memory notices no change. Not collective."""
        return 0

    def place(self) -> Place | None:
        """Return nothing: the memory is private. Not collective."""
        return None

    def span(self) -> tuple[int, int]:
        """Return nothing: the memory is private. Not collective."""
        return 0, 0
