# SPDX-License-Identifier: Apache-2.0
"""Compares two generations: by digest first, by value where digests differ.

Only blocks whose digests differ are read, one of each side at a time, so memory stays at
two blocks for leaves of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt import dtypes
from mpi_ckpt.cli.inspect.numeric import Difference, is_numeric

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi_ckpt.leaf import LeafSpec
    from mpi_ckpt.storage.format.manifest import StoredLeaf, StoredState
    from mpi_ckpt.storage.reading.reader import GenerationReader

STREAM = "(stream)"
_CHANGES_MAX = 1000


@dataclass(frozen=True, slots=True)
class LeafChange:
    """One leaf of either generation, or the stream of a plain state.

    Attributes:
        state: Name of the state.
        leaf: Name of the leaf, or ``STREAM``.
        change: ``equal``, ``changed``, ``added`` or ``removed``.
        left: Its form in the first generation; None if it is not in there.
        right: The same in the second.
        left_bytes: Its bytes in the first.
        right_bytes: Its bytes in the second.
        difference: How far apart the values are, if known.
    """

    state: str
    leaf: str
    change: str
    left: LeafSpec | None = None
    right: LeafSpec | None = None
    left_bytes: int = 0
    right_bytes: int = 0
    difference: Difference | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the change as JSON values."""
        document: dict[str, Any] = {
            "state": self.state,
            "leaf": self.leaf,
            "change": self.change,
        }
        for side, spec, nbytes in (
            ("left", self.left, self.left_bytes),
            ("right", self.right, self.right_bytes),
        ):
            if spec is not None:
                shape = list(spec.shape)
                document[side] = {"dtype": spec.dtype, "shape": shape, "bytes": nbytes}
        if self.difference is not None:
            document |= {
                "elements_differing": self.difference.differing,
                "max_abs": self.difference.max_abs,
                "max_rel": self.difference.max_rel,
                "not_finite": self.difference.not_finite,
            }
        return document


_Entry = tuple["LeafSpec | None", "StoredLeaf"]


def compare_generations(
    left: GenerationReader, right: GenerationReader, done: Callable[[int], None]
) -> list[LeafChange]:
    """Compare all leaves and streams of two open generations.

    Args:
        left: The first.
        right: The second.
        done: Called with the bytes of each leaf of the first when it is done.

    Raises:
        CorruptGenerationError: If bytes that must be read are not those saved.
        ReadError: If they cannot be read.
    """
    ours, theirs = _entries(left), _entries(right)
    changes = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        mine, other = ours.get(key), theirs.get(key)
        if mine is None or other is None:
            changes.append(_one_sided(key, mine, other))
        else:
            changes.append(_compare(key, (left, mine), (right, other)))
        if mine is not None:
            done(mine[1].extent.nbytes)
    return changes


def structure_changes(left: Any, right: Any) -> list[tuple[str, Any, Any]]:  # noqa: ANN401 (JSON)
    """Return path and both values for every difference between JSON values.

    An entry on one side only has None on the other.
    """
    changes: list[tuple[str, Any, Any]] = []
    stack = [("", left, right)]
    while stack and len(changes) < _CHANGES_MAX:
        path, a, b = stack.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            keys: list[Any] = sorted({*a, *b}, reverse=True)
        elif isinstance(a, list) and isinstance(b, list):
            keys = list(reversed(range(max(len(a), len(b)))))
        else:
            if type(a) is not type(b) or a != b:
                changes.append((path, a, b))
            continue
        stack += [(f"{path}/{k}" if path else f"{k}", _at(a, k), _at(b, k)) for k in keys]
    return changes


def _at(value: Any, key: Any) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, dict):
        return value.get(key)
    return value[key] if key < len(value) else None


def _entries(reader: GenerationReader) -> dict[tuple[str, str], _Entry]:
    entries: dict[tuple[str, str], _Entry] = {}
    for state in reader.manifest.states:
        entries.update(_state_entries(state))
    return entries


def _state_entries(state: StoredState) -> dict[tuple[str, str], _Entry]:
    if state.is_stream:
        return {(state.name, STREAM): (None, state.leaves[0])}
    return {(state.name, leaf.spec.name): (leaf.spec, leaf) for leaf in state.leaves}


def _one_sided(
    key: tuple[str, str], mine: _Entry | None, other: _Entry | None
) -> LeafChange:
    return LeafChange(
        *key,
        change="added" if mine is None else "removed",
        left=mine[0] if mine else None,
        right=other[0] if other else None,
        left_bytes=mine[1].extent.nbytes if mine else 0,
        right_bytes=other[1].extent.nbytes if other else 0,
    )


def _compare(
    key: tuple[str, str],
    left: tuple[GenerationReader, _Entry],
    right: tuple[GenerationReader, _Entry],
) -> LeafChange:
    (reader, (spec, leaf)), (other_reader, (other_spec, other)) = left, right
    same_blocks = reader.manifest.block_bytes == other_reader.manifest.block_bytes
    equal = spec == other_spec and leaf.extent.nbytes == other.extent.nbytes
    # Digests of other block lengths cannot be compared: those leaves count as changed.
    equal = equal and same_blocks and leaf.digest == other.digest
    difference = None
    if not equal and spec is not None and spec == other_spec and same_blocks:
        difference = _difference(spec, (reader, leaf), (other_reader, other))
    return LeafChange(
        *key,
        change="equal" if equal else "changed",
        left=spec,
        right=other_spec,
        left_bytes=leaf.extent.nbytes,
        right_bytes=other.extent.nbytes,
        difference=difference,
    )


def _difference(
    spec: LeafSpec,
    left: tuple[GenerationReader, StoredLeaf],
    right: tuple[GenerationReader, StoredLeaf],
) -> Difference | None:
    block_bytes = left[0].manifest.block_bytes
    if not is_numeric(spec.dtype) or block_bytes % dtypes.element_bytes(spec.dtype):
        return None
    difference = Difference(spec.dtype)
    pairs = zip(left[1].digest.blocks, right[1].digest.blocks, strict=True)
    for block, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            difference.add(
                left[0].read_block(left[1], block), right[0].read_block(right[1], block)
            )
    return difference
