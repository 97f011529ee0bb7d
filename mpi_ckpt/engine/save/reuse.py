# SPDX-License-Identifier: Apache-2.0
"""Finds leaves that an older generation already holds, which need no writing. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.engine.sync.captured import CapturedState, pick_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.engine.sync.captured import Fingerprints
    from mpi_ckpt.leaves.leaf import Form
    from mpi_ckpt.storage.format.manifest import (
        Manifest,
        StoredFile,
        StoredLeaves,
        StoredState,
    )

# If less than this share of a file's data is still in use, the file is no longer shared:
# the unused rest would waste disk space.
_LIVE_SHARE_MIN = 0.5


@dataclass(frozen=True, slots=True)
class KnownLeaves:
    """The fingerprints of leaves when this process has saved them.

    A leaf with the same fingerprint has the bytes that were copied to be written then. So
    a leaf on a device that is unchanged need not be copied to the host to be shared.

    Attributes:
        generation: The generation that has them.
        states: State -> the form of its leaves, and their fingerprints.
    """

    generation: int = 0
    states: Mapping[str, tuple[Form, Fingerprints]] = field(default_factory=dict)

    @classmethod
    def of(cls, generation: int, captured: Iterable[CapturedState]) -> KnownLeaves:
        """Note the states that have fingerprints. Not collective.

        Args:
            generation: The generation that holds them.
            captured: The states as they were saved.
        """
        known = {
            one.name: (one.form, one.fingerprints)
            for one in captured
            if one.fingerprints is not None
        }
        return cls(generation, known)

    def unchanged(
        self, older: Manifest, content: CapturedState
    ) -> NDArray[np.int64] | None:
        """Return the indices of a state's leaves that a generation holds unchanged.

        Not collective.

        Args:
            older: The generation.
            content: The state.

        Returns:
            None if fingerprints do not say.
        """
        known, stored = self.states.get(content.name), older.state(content.name)
        if self.generation != older.generation or known is None or stored is None:
            return None
        (form, then), now = known, content.fingerprints
        if now is None or now.places != then.places or stored.is_stream:
            return None
        if not content.form.specs == form.specs == stored.leaves.form.specs:
            return None
        return np.flatnonzero((now.rows == then.rows).all(axis=1))


@dataclass(frozen=True, slots=True)
class SharedLeaves:
    """The leaves that a new generation shares with an older one.

    Attributes:
        numbers: Index of a state -> the indices of its shared leaves, ascending.
        leaves: Index of a state -> these leaves in the older generation.
        states: States carried over unchanged.
        files: The older generation's files that these need, by name.
    """

    numbers: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)
    leaves: Mapping[int, StoredLeaves] = field(default_factory=dict)
    states: tuple[StoredState, ...] = ()
    files: Mapping[str, StoredFile] = field(default_factory=dict)

    def others(self, index: int, count: int) -> Sequence[int]:
        """Return the indices of a state's leaves that are not shared. Not collective.

        Args:
            index: Index of the state.
            count: Number of its leaves.
        """
        if index not in self.numbers:
            return range(count)
        others: list[int] = np.delete(np.arange(count), self.numbers[index]).tolist()
        return others

    def in_files(self, files: Mapping[str, StoredFile]) -> SharedLeaves:
        """Return it with some files only; other leaves are written again. Not collective.

        Args:
            files: The files; those of the carried states among them.
        """
        numbers, leaves = {}, {}
        for index, found in self.leaves.items():
            inside = found.extents.are_in(files)
            if inside.any():
                numbers[index] = self.numbers[index][inside]
                leaves[index] = found.pick(np.flatnonzero(inside))
        return SharedLeaves(numbers, leaves, self.states, files)

    def without_files(self, refused: set[str]) -> SharedLeaves:
        """Return it without some files; their leaves are written again. Not collective."""
        if not refused:
            return self
        files = {name: file for name, file in self.files.items() if name not in refused}
        return self.in_files(files)

    def renamed(self, rename: Callable[[str, int], str]) -> SharedLeaves:
        """Return it with the files' names in the new generation. Not collective.

        Args:
            rename: Makes the new name from the old one and the generation that wrote the
                file.
        """
        names = {name: rename(name, file.generation) for name, file in self.files.items()}
        return SharedLeaves(
            self.numbers,
            {index: found.renamed(names) for index, found in self.leaves.items()},
            states=tuple(
                replace(
                    state,
                    leaves=state.leaves.renamed(names),
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
    known: KnownLeaves | None = None,
) -> SharedLeaves:
    """Find the leaves that an older generation holds unchanged.

    Not collective. Thread-safe. A leaf is unchanged if its state, name, dtype, shape and
    digest are the same, or its fingerprint.

    Args:
        older: The newest generation.
        captured: The contents to save; only states with digests or known fingerprints are
            compared.
        generation: Number of the new generation.
        full_every: Files written so many generations ago, or more, are not shared.
        carried: States of ``older`` that must be carried over in any case.
        known: The fingerprints of its leaves.
    """
    files = {file.name: file for file in older.files}
    needed = {name for state in carried for name in (*state.leaves.files, *state.files)}
    unchanged = _unchanged(older, captured, known or KnownLeaves())
    live: Counter[str] = Counter()
    for leaves in [*unchanged.leaves.values(), *(state.leaves for state in carried)]:
        for name in leaves.files:
            live[name] += leaves.bytes_of({name})
    shared = needed | {
        name
        for name, nbytes in live.items()
        if nbytes >= _LIVE_SHARE_MIN * (files[name].nbytes - files[name].header_bytes)
        and generation - files[name].generation < full_every
    }
    return replace(unchanged, states=tuple(carried)).in_files(
        {name: files[name] for name in sorted(shared)}
    )


def sample(captured: Sequence[CapturedState], count: int) -> list[CapturedState]:
    """Pick leaves at ``count`` places spread evenly over the bytes of some states.

    Not collective. Thread-safe. From adjacent leaves that hold more than one part in
    ``count`` of all bytes, it always picks one.
    """
    ends = np.cumsum(np.concatenate([[0], *(content.form.sizes for content in captured)]))
    places = (np.arange(count) + 0.5) * (ends[-1] / count)
    picked = np.unique(np.searchsorted(ends[1:], places, side="right"))
    firsts = accumulate((len(content.leaves) for content in captured), initial=0)
    return [
        pick_leaves(content, (picked[(first <= picked) & (picked < last)] - first).tolist())
        for content, (first, last) in zip(captured, pairwise(firsts), strict=True)
    ]


def has_unchanged(older: Manifest, captured: Sequence[CapturedState]) -> bool:
    """Return whether an older generation holds any of the digested leaves unchanged.

    Not collective. Thread-safe.
    """
    return bool(_unchanged(older, captured, KnownLeaves()).leaves)


def _unchanged(
    older: Manifest, captured: Sequence[CapturedState], known: KnownLeaves
) -> SharedLeaves:
    numbers, leaves = {}, {}
    for index, content in enumerate(captured):
        stored = older.state(content.name)
        if stored is None or stored.is_stream:
            continue
        same = known.unchanged(older, content)
        if same is not None:
            here = there = same
        elif content.digests is not None:
            here, there = _alike(content, stored.leaves)
        else:
            continue
        if len(here):
            numbers[index], leaves[index] = here, stored.leaves.pick(there)
    return SharedLeaves(numbers, leaves)


def _alike(
    content: CapturedState, stored: StoredLeaves
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the leaves of equal spec and digest, here and there."""
    assert content.digests is not None
    ours, theirs = content.form, stored.form
    here = there = np.arange(len(ours.specs))
    is_same_form = ours is theirs or ours.specs == theirs.specs
    if not is_same_form:
        known = {name: number for number, name in enumerate(theirs.names)}
        pairs = [(n, known[name]) for n, name in enumerate(ours.names) if name in known]
        here, there = np.array(pairs, np.int64).reshape(-1, 2).T
    # Compare digests first: they usually differ.
    is_same = (content.digests.rows[here] == stored.digests.rows[there]).all(axis=1)
    here, there = here[is_same], there[is_same]
    if not is_same_form or content.digests.several or stored.digests.several:
        is_same = np.array(
            [
                ours.specs[i] == theirs.specs[j]
                and content.digests[i].blocks == stored.digests[j].blocks
                for i, j in zip(here.tolist(), there.tolist(), strict=True)
            ],
            np.bool_,
        )
        here, there = here[is_same], there[is_same]
    return here, there
