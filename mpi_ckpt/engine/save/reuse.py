# SPDX-License-Identifier: Apache-2.0
"""Finds leaves that an older generation already holds, which need no writing. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.engine.sync.captured import CapturedState, pick_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpi_ckpt.storage.format.manifest import (
        Manifest,
        StoredFile,
        StoredLeaf,
        StoredState,
    )

# If less than this share of a file's data is still in use, the file is no longer shared:
# the unused rest would waste disk space.
_LIVE_SHARE_MIN = 0.5


@dataclass(frozen=True, slots=True)
class SharedLeaves:
    """The leaves that a new generation shares with an older one.

    Attributes:
        leaves: (Index of the state, index of the leaf) -> its place in the older
            generation.
        states: States carried over unchanged.
        files: The older generation's files that these need, by name.
    """

    leaves: Mapping[tuple[int, int], StoredLeaf] = field(default_factory=dict)
    states: tuple[StoredState, ...] = ()
    files: Mapping[str, StoredFile] = field(default_factory=dict)

    def without_files(self, refused: set[str]) -> SharedLeaves:
        """Return it without some files; their leaves are written again. Not collective."""
        leaves = {
            at: leaf for at, leaf in self.leaves.items() if leaf.extent.file not in refused
        }
        files = {name: file for name, file in self.files.items() if name not in refused}
        return SharedLeaves(leaves, self.states, files)

    def renamed(self, rename: Callable[[str, int], str]) -> SharedLeaves:
        """Return it with the files' names in the new generation. Not collective.

        Args:
            rename: Makes the new name from the old one and the generation that wrote the
                file.
        """
        names = {name: rename(name, file.generation) for name, file in self.files.items()}

        def moved(leaf: StoredLeaf) -> StoredLeaf:
            extent = leaf.extent._replace(file=names[leaf.extent.file])
            return leaf._replace(extent=extent)

        return SharedLeaves(
            leaves={at: moved(leaf) for at, leaf in self.leaves.items()},
            states=tuple(
                replace(
                    state,
                    leaves=tuple(map(moved, state.leaves)),
                    files=tuple(names[file] for file in state.files),
                )
                for state in self.states
            ),
            files={
                names[name]: replace(file, name=names[name])
                for name, file in self.files.items()
            },
        )


def plan_reuse(
    older: Manifest,
    captured: Sequence[CapturedState],
    *,
    generation: int,
    full_every: int,
    carried: Sequence[StoredState] = (),
) -> SharedLeaves:
    """Find the leaves that an older generation holds unchanged.

    Not collective. Thread-safe. A leaf is unchanged if its state, name, dtype, shape and
    digest are the same.

    Args:
        older: The newest generation.
        captured: The contents to save; only digested states are compared.
        generation: Number of the new generation.
        full_every: Files written so many generations ago, or more, are not shared.
        carried: States of ``older`` that must be carried over in any case.
    """
    files = {file.name: file for file in older.files}
    taken = [leaf for state in carried for leaf in state.leaves]
    needed = {leaf.extent.file for leaf in taken}
    needed |= {name for state in carried for name in state.files}
    unchanged = _unchanged(older, captured)
    live: dict[str, int] = {}
    for leaf in [*unchanged.values(), *taken]:
        live[leaf.extent.file] = live.get(leaf.extent.file, 0) + leaf.extent.nbytes
    shared = needed | {
        name
        for name, nbytes in live.items()
        if nbytes >= _LIVE_SHARE_MIN * (files[name].nbytes - files[name].header_bytes)
        and generation - files[name].generation < full_every
    }
    return SharedLeaves(
        leaves={at: leaf for at, leaf in unchanged.items() if leaf.extent.file in shared},
        states=tuple(carried),
        files={name: files[name] for name in sorted(shared)},
    )


def sample(captured: Sequence[CapturedState], count: int) -> list[CapturedState]:
    """Pick leaves at ``count`` places spread evenly over the bytes of some states.

    Not collective. Thread-safe. From adjacent leaves that hold more than one part in
    ``count`` of all bytes, it always picks one.
    """
    sizes = [spec.nbytes for content in captured for spec in content.specs]
    ends = list(accumulate(sizes, initial=0))
    places = (np.arange(count) + 0.5) * (ends[-1] / count)
    picked = set(np.searchsorted(ends[1:], places, side="right").tolist())
    firsts = accumulate((len(content.leaves) for content in captured), initial=0)
    return [
        pick_leaves(content, [n for n in range(len(content.leaves)) if first + n in picked])
        for content, first in zip(captured, firsts, strict=False)
    ]


def has_unchanged(older: Manifest, captured: Sequence[CapturedState]) -> bool:
    """Return whether an older generation holds any of the digested leaves unchanged.

    Not collective. Thread-safe.
    """
    return bool(_unchanged(older, captured))


def _unchanged(
    older: Manifest, captured: Sequence[CapturedState]
) -> dict[tuple[int, int], StoredLeaf]:
    found: dict[tuple[int, int], StoredLeaf] = {}
    for index, content in enumerate(captured):
        stored = older.state(content.name)
        if stored is None or content.digests is None or stored.is_stream:
            continue
        known = {leaf.spec.name: leaf for leaf in stored.leaves}
        for number, (spec, digest) in enumerate(
            zip(content.specs, content.digests, strict=True)
        ):
            leaf = known.get(spec.name)
            # Compare digests first: they usually differ.
            if (
                leaf is not None
                and leaf.digest.blocks == digest.blocks
                and leaf.spec == spec
            ):
                found[index, number] = leaf
    return found
