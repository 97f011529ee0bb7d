# SPDX-License-Identifier: Apache-2.0
"""Copies leaves from devices into the copy of a save, and digests them in the same pass."""

from __future__ import annotations

from collections import deque
from contextlib import closing
from typing import TYPE_CHECKING, Any

from mpi_ckpt.devices import land
from mpi_ckpt.errors import StageError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.digest import BlockHasher, Digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpi_ckpt.devices import Copy
    from mpi_ckpt.leaves.leaf import Leaf
    from mpi_ckpt.memory import Arena


def is_on_device(leaf: Leaf) -> bool:
    """Return whether a leaf is on a device from which `land_leaves` copies.

    Not collective.
    """
    return hasattr(leaf.buffer, "copies")


def pin_for(arena: Arena, leaves: Sequence[Leaf]) -> None:
    """Let devices copy into an arena by themselves, if any of the leaves is on one.

    Not collective.
    """
    found: Any = next((leaf.buffer for leaf in leaves if is_on_device(leaf)), None)
    if found is not None:
        arena.pin(found.lane)


def require_gates(leaves: Sequence[Leaf]) -> None:
    """Refuse to copy leaves later, if work for their device may change them meanwhile.

    Not collective.

    Args:
        leaves: Leaves behind one gate.

    Raises:
        StageError: On the calling rank, if that work does not pass the gate.
    """
    leaf = next(filter(is_on_device, leaves), None)
    bypass = leaf.gate.bypass() if leaf is not None and leaf.gate is not None else None
    if leaf is not None and bypass is not None:
        raise StageError(
            f"overlap=True, but {bypass}: a replay changes leaf {leaf.spec.name!r} while "
            "it is being copied, and nothing would notice it. Nothing of this save is "
            "kept; make the state with overlap=False, or capture no step()"
        )


def land_leaves(
    leaves: Sequence[Leaf], places: Sequence[memoryview], *, digested: bool
) -> list[Digest]:
    """Copy leaves from devices: each chunk is digested while the next one flies.

    Not collective. Thread-safe.

    Args:
        leaves: The leaves.
        places: Where to copy each, as long as it is.
        digested: Whether to digest them.

    Returns:
        One digest for each leaf, in order; none if none was wanted.
    """
    owners: deque[int] = deque()

    def copies() -> Iterator[Copy]:
        for number, (leaf, place) in enumerate(zip(leaves, places, strict=True)):
            buffer: Any = leaf.buffer
            with concerning(f"leaf {leaf.spec.name!r}"):
                made = buffer.copies(place)
            owners.extend(number for _ in made)
            yield from made

    hashers = [BlockHasher() for _ in leaves] if digested else []
    with closing(land(copies())) as landed:
        for copy in landed:
            owner = owners.popleft()
            if digested:
                hashers[owner].update(copy.data)
    return [hasher.finish() for hasher in hashers]
