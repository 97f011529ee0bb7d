# SPDX-License-Identifier: Apache-2.0
"""Which leaves need not be written again, because an older generation has them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.engine.contents import Contents, pick_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpi_ckpt.storage.manifest import Extent, Manifest, StoredFile, StoredState

__all__ = ["Reuse", "has_unchanged", "plan_reuse", "renamed", "sample", "without_files"]

# A file of whose data less than this share is still in use is not shared any further: the
# rest of it would stay on disk for nothing.
_LIVE_SHARE_MIN = 0.5


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a new generation takes from an older one.

    Attributes:
        leaves: (Index of the contents, index of the leaf) -> where the older one has it.
        states: States taken along as they are.
        files: The older one's files that these need, by name.
    """

    leaves: Mapping[tuple[int, int], Extent] = field(default_factory=dict)
    states: tuple[StoredState, ...] = ()
    files: Mapping[str, StoredFile] = field(default_factory=dict)


def plan_reuse(
    older: Manifest,
    contents: Sequence[Contents],
    *,
    generation: int,
    full_every: int,
    carried: Sequence[StoredState] = (),
) -> Reuse:
    """Find the leaves that an older generation holds unchanged.

    Not collective. Thread-safe. A leaf is unchanged if state, name, dtype, shape and
    digest are.

    Args:
        older: The newest generation there is.
        contents: What is to be saved; only digested contents are looked at.
        generation: Number of the new generation.
        full_every: Files written so many generations ago, or more, are not shared.
        carried: States of ``older`` that must be taken along, whatever it costs.
    """
    files = {file.name: file for file in older.files}
    needed = {extent.file for state in carried for extent in state.extents}
    unchanged = _unchanged(older, contents)
    live: dict[str, int] = {}
    for extent in [*unchanged.values(), *(e for s in carried for e in s.extents)]:
        live[extent.file] = live.get(extent.file, 0) + extent.nbytes
    shared = needed | {
        name
        for name, nbytes in live.items()
        if nbytes >= _LIVE_SHARE_MIN * (files[name].nbytes - files[name].header_bytes)
        and generation - files[name].generation < full_every
    }
    return Reuse(
        leaves={at: extent for at, extent in unchanged.items() if extent.file in shared},
        states=tuple(carried),
        files={name: files[name] for name in sorted(shared)},
    )


def sample(contents: Sequence[Contents], count: int) -> list[Contents]:
    """Pick leaves at so many places spread evenly over the bytes of some contents.

    Not collective. Thread-safe. Of leaves side by side that hold more than one part in
    ``count`` of all bytes, one is always picked.
    """
    sizes = [spec.nbytes for one in contents for spec in one.specs]
    ends = list(accumulate(sizes, initial=0))
    places = (np.arange(count) + 0.5) * (ends[-1] / count)
    picked = set(np.searchsorted(ends[1:], places, side="right").tolist())
    firsts = accumulate((len(one.leaves) for one in contents), initial=0)
    return [
        pick_leaves(one, [n for n in range(len(one.leaves)) if first + n in picked])
        for one, first in zip(contents, firsts, strict=False)
    ]


def has_unchanged(older: Manifest, contents: Sequence[Contents]) -> bool:
    """Tell whether an older generation holds any of some digested leaves unchanged.

    Not collective. Thread-safe.
    """
    return bool(_unchanged(older, contents))


def without_files(reuse: Reuse, refused: set[str]) -> Reuse:
    """Give up sharing some files; their leaves are written again. Not collective."""
    return Reuse(
        leaves={at: e for at, e in reuse.leaves.items() if e.file not in refused},
        states=reuse.states,
        files={name: f for name, f in reuse.files.items() if name not in refused},
    )


def renamed(reuse: Reuse, rename: Callable[[str, int], str]) -> Reuse:
    """Give the files the names they have in the new generation. Not collective.

    Args:
        reuse: With the names of the older generation.
        rename: From a name and the generation that wrote the file.
    """
    names = {name: rename(name, file.generation) for name, file in reuse.files.items()}

    def moved(extent: Extent) -> Extent:
        return replace(extent, file=names[extent.file])

    def moved_state(state: StoredState) -> StoredState:
        leaves = tuple(replace(leaf, extent=moved(leaf.extent)) for leaf in state.leaves)
        stream = None if state.stream is None else moved(state.stream)
        return replace(state, leaves=leaves, stream=stream)

    return Reuse(
        leaves={at: moved(extent) for at, extent in reuse.leaves.items()},
        states=tuple(moved_state(state) for state in reuse.states),
        files={
            names[name]: replace(file, name=names[name])
            for name, file in reuse.files.items()
        },
    )


def _unchanged(
    older: Manifest, contents: Sequence[Contents]
) -> dict[tuple[int, int], Extent]:
    found: dict[tuple[int, int], Extent] = {}
    for index, one in enumerate(contents):
        stored = older.state(one.state.name)
        if stored is None or one.digests is None:
            continue
        known = {leaf.spec.name: leaf for leaf in stored.leaves}
        for number, (spec, digest) in enumerate(zip(one.specs, one.digests, strict=True)):
            leaf = known.get(spec.name)
            # The digests first: they are what differs, as a rule.
            if (
                leaf is not None
                and leaf.extent.digest.blocks == digest.blocks
                and leaf.spec == spec
            ):
                found[index, number] = leaf.extent
    return found
