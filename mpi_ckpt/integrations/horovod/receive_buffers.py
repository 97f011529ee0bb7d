# SPDX-License-Identifier: Apache-2.0
"""Provides memory for received objects, and keeps it for the next one. No MPI.

Fresh memory is the main cost of a received object: its first touch takes up to ten times as
long as the copy into it, at worst in a virtual machine that has returned the memory to its
host. Large blocks use huge pages, which are cheaper, and are reused.
"""

from __future__ import annotations

import weakref
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.memory import Arena, round_up

if TYPE_CHECKING:
    from collections.abc import Sequence

# A small array that outlives the rest of its object keeps at most this much.
_BLOCK_BYTES = 16 << 20
_KEPT_BYTES_MAX = 256 << 20
_ALIGNMENT = 64

# Unused blocks, the most recently freed last. Objects end on any thread, so each step here
# is atomic in Python.
_kept: list[Arena] = []


def allocate_buffers(lengths: Sequence[int]) -> list[memoryview]:
    """Return memory for the buffers of an object, several in one block.

    Not collective. A block is free again when nothing refers to any part of it.

    Args:
        lengths: Bytes of each buffer.
    """
    room: list[memoryview] = []
    waiting: list[int] = []
    filled = 0
    for length in lengths:
        waiting.append(length)
        filled += round_up(length, _ALIGNMENT)
        if filled >= _BLOCK_BYTES:
            room += _divide(waiting)
            waiting, filled = [], 0
    return room + _divide(waiting)


def _divide(lengths: Sequence[int]) -> list[memoryview]:
    sizes = [round_up(length, _ALIGNMENT) for length in lengths]
    starts = list(accumulate(sizes, initial=0))
    block = _take(starts.pop())
    return [block[s : s + n] for s, n in zip(starts, lengths, strict=True)]


def _take(nbytes: int) -> memoryview:
    if nbytes < _BLOCK_BYTES:
        return np.empty(nbytes, np.uint8).data
    arena = _find_kept(nbytes) or Arena(huge_pages=True)
    memory = arena.take(nbytes)[:nbytes]
    # Received objects refer to this view, through a memoryview, and never to the memory.
    view: Any = np.frombuffer(memory, np.uint8)
    weakref.finalize(view, _give_back, arena).atexit = False
    return memoryview(view)


def _find_kept(nbytes: int) -> Arena | None:
    for _ in range(len(_kept)):
        try:
            arena = _kept.pop()
        except IndexError:
            return None
        if nbytes <= arena.nbytes <= 2 * nbytes:
            return arena
        _kept.insert(0, arena)
    return None


def _give_back(arena: Arena) -> None:
    _kept.append(arena)
    while sum(arena.nbytes for arena in _kept) > _KEPT_BYTES_MAX:
        del _kept[:1]
