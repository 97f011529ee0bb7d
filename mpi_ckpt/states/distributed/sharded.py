# SPDX-License-Identifier: Apache-2.0
"""Defines the state of global arrays whose boxes are spread over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import RegistrationError, StageError, StateMismatchError
from mpi_ckpt.leaves.tiles import cut_leaf
from mpi_ckpt.state import Arrival, Capture, LeafState
from mpi_ckpt.states.arrays import CONCATENATED, SHARDED
from mpi_ckpt.states.buffers.array_bytes import ReadonlyMemory
from mpi_ckpt.states.distributed.blocks import Block
from mpi_ckpt.states.leaf_values import takes_bytes
from mpi_ckpt.states.mismatch import raise_mismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.state import Structure, SyncMode

__all__ = ["ShardedArrayState"]


class ShardedArrayState(LeafState):
    """Global arrays of which each rank has blocks, restored in place.

    A save writes each element once; a restore fills the blocks that the program has then,
    on any number of ranks and in any decomposition. Blocks of the same box on several ranks
    are replicas; otherwise the interiors of all ranks are disjoint. Together they make the
    whole array.

    Args:
        name: As for `mpi_ckpt.State`.
        blocks: Name of each global array -> this rank's block of it, or its blocks. A rank
            without a block gives an empty list, or leaves the name out. A function that
            returns them is called at each save and restore: for a program that swaps two
            buffers, or moves its boundaries.
        sync: ``"check"``: a save compares replicas, and a difference is an error that names
            them. ``"none"``: it saves the replica of any rank.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal, or
            an entry is no block.
    """

    def __init__(
        self,
        name: str,
        blocks: Mapping[str, Block | Sequence[Block]]
        | Callable[[], Mapping[str, Block | Sequence[Block]]],
        *,
        sync: SyncMode = "check",
    ) -> None:
        super().__init__(name, sync=sync)
        require_cut_mode(name, sync)
        self.takes_any_replica = sync == "none"
        self._asked = blocks if callable(blocks) else None
        self._kept: dict[str, Any] = {} if callable(blocks) else dict(blocks)
        self._is_looked_at = False
        problems = _no_blocks(self._kept)
        if problems:
            raise RegistrationError(f"state {name!r}: {'; '.join(problems)}")

    @property
    def blocks(self) -> dict[str, Block | Sequence[Block]]:
        """The live blocks; replace an entry freely between saves.

        A given function is called each time.
        """
        return self._kept if self._asked is None else dict(self._asked())

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        # Checked at the first save; blocks replaced later are checked at the restore.
        memory = None if self._is_looked_at else ReadonlyMemory()
        parts, problems = self._look(memory)
        if problems:
            raise StageError(
                f"state {self.name!r} cannot be saved:\n    " + "\n    ".join(problems),
                problems=problems,
            )
        self._is_looked_at = True
        return Capture(
            SHARDED,
            [
                cut_leaf(spec, [tile for block in own for tile in block.interior()])
                for spec, own in parts
            ],
        )

    def prepare(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Arrival:
        """See `LeafState`. Not collective.

        A saved array of which this rank has no block is not unexpected: other ranks may
        have its blocks.
        """
        require_arrays(self.name, structure)
        parts, problems = self._look(ReadonlyMemory())
        saved = {spec.name: spec for spec in specs}
        missing = [spec.name for spec, _ in parts if spec.name not in saved]
        problems += [
            f"{saved[spec.name]} is saved, the program has {spec}"
            for spec, _ in parts
            if spec.name in saved and saved[spec.name] != spec
        ]
        problems += [
            f"{spec} is in the program, not in the checkpoint"
            for spec, _ in parts
            if strict and spec.name in missing
        ]
        raise_mismatch(self.name, problems)
        targets = {
            spec.name: cut_leaf(spec, [tile for block in own for tile in block.targets()])
            for spec, own in parts
        }
        return Arrival(
            [targets.get(spec.name) for spec in specs],
            adopt=lambda: None,
            missing=tuple(missing),
        )

    def _look(
        self, memory: ReadonlyMemory | None
    ) -> tuple[list[tuple[LeafSpec, list[Block]]], list[str]]:
        """Return the arrays that this rank has blocks of, and why some cannot be saved."""
        live = self.blocks
        problems = _no_blocks(live)
        parts: list[tuple[LeafSpec, list[Block]]] = []
        # Ranks may list their arrays in any order, and leave some out.
        for key in sorted(live if not problems else ()):
            blocks = _blocks(live[key])
            if not blocks:
                continue
            spec = blocks[0].spec(key)
            problems += [
                f"{key} has blocks of two arrays: {spec} and {other}"
                for other in {block.spec(key) for block in blocks[1:]} - {spec}
            ]
            if memory is not None and not all(takes_bytes(b.array, memory) for b in blocks):
                problems.append(
                    f"{key} has a block in memory that may only be read: bytes cannot be "
                    "put back into it"
                )
            parts.append((spec, blocks))
        return parts, problems


def require_cut_mode(state: str, sync: SyncMode) -> None:
    """Refuse modes that make replicas equal: ranks have different parts. Not collective.

    Args:
        state: Name of the state.
        sync: The given mode.

    Raises:
        RegistrationError: On the calling rank.
    """
    if sync not in ("check", "none"):
        raise RegistrationError(
            f"state {state!r}: sync is {sync!r}, expected 'check' or 'none': each rank has "
            "its own part of the arrays, and no rank's value could stand for the others'"
        )


def require_arrays(state: str, structure: Structure) -> None:
    """Require a saved structure of a state of arrays, whole or cut. Not collective.

    Args:
        state: Name of the state.
        structure: Its saved structure.

    Raises:
        StateMismatchError: On the calling rank.
    """
    # An ArrayState has no structure.
    if structure not in (None, SHARDED, CONCATENATED):
        raise StateMismatchError(
            f"state {state!r} was not saved from arrays; nothing was changed: take the "
            "kind of state that it was saved from"
        )


def _blocks(given: Block | Sequence[Block]) -> list[Block]:
    return [given] if isinstance(given, Block) else list(given)


def _no_blocks(given: Mapping[str, Any]) -> list[str]:
    """Return the problem of each entry that is neither a block nor a list of them."""
    problems = []
    for key, value in given.items():
        listed = value if isinstance(value, (list, tuple)) else [value]
        wrong = [one for one in listed if not isinstance(one, Block)]
        if type(key) is not str:
            problems.append(f"{key!r} is no name: expected text")
        elif wrong:
            problems.append(
                f"{key} is a {type(wrong[0]).__name__}, expected a Block or a list of them"
            )
    return problems
