# SPDX-License-Identifier: Apache-2.0
"""Captures the contents of a state at the moment of a save, with their digests."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.devices import following
from mpi_ckpt.errors import StageError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.buckets import fingerprint_leaves, pieces_of, read_leaves
from mpi_ckpt.leaves.digest import Digests, digest_bytes, digest_many

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.leaves.leaf import Form, Leaf, LeafSpec
    from mpi_ckpt.state import Capture, LeafState, Structure
    from mpi_ckpt.states.unshared.ranked import RankedState


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What is compared of leaves in place of their digests.

    Attributes:
        wholes: For each leaf 16 bytes, in a row: of a leaf on a device its fingerprint, of
            another one its digest.
        places: For each leaf one byte: whether it is on a device.
    """

    wholes: bytes
    places: bytes

    @property
    def rows(self) -> NDArray[np.uint64]:
        """The 16 bytes of each leaf as a row of two numbers, for comparisons."""
        return np.frombuffer(self.wholes, np.uint64).reshape(-1, 2)

    def pick(self, numbers: Sequence[int]) -> Fingerprints:
        """Return those of some leaves. Not collective. Thread-safe."""
        chosen = np.asarray(numbers, np.int64)
        places = np.frombuffer(self.places, np.uint8)[chosen]
        return Fingerprints(self.rows[chosen].tobytes(), places.tobytes())


@dataclass(frozen=True, slots=True)
class CapturedState:
    """The contents of a leaf state, by reference.

    Attributes:
        state: The state.
        structure: Its JSON values.
        leaves: Its whole leaves, which all ranks have.
        form: Specs of these leaves.
        digests: A digest for each of them; None as long as they were not needed.
        cut: Its leaves that are cut over the ranks, as far as this rank has them.
        fingerprints: Of its whole leaves; None if they are compared by digests, or not yet.
    """

    state: LeafState
    structure: Structure
    leaves: tuple[Leaf, ...]
    form: Form
    digests: Digests | None = None
    cut: tuple[Leaf, ...] = ()
    fingerprints: Fingerprints | None = None

    @property
    def is_comparable(self) -> bool:
        """Whether it has fingerprints or digests."""
        return self.fingerprints is not None or self.digests is not None

    @property
    def wholes(self) -> bytes:
        """The fingerprints of its leaves, or else their digests, in a row."""
        known = self.digests if self.fingerprints is None else self.fingerprints
        return b"" if known is None else known.wholes

    @property
    def name(self) -> str:
        """The state's name."""
        return self.state.name

    @property
    def specs(self) -> tuple[LeafSpec, ...]:
        """The leaves' specs, in order."""
        return self.form.specs

    def summary(self) -> tuple[bytes, bytes, bytes, bytes]:
        """Return four digests: of specs, structure, bytes, and which have fingerprints.

        Not collective.
        """
        places = b"" if self.fingerprints is None else self.fingerprints.places
        with concerning(f"state {self.name!r}"):  # a value of another class than JSON's
            structure = json.dumps(self.structure).encode()
        return (
            digest_bytes(self.form.text),
            digest_bytes(structure),
            digest_bytes(self.wholes),
            digest_bytes(places.lstrip(b"\0")),
        )


def capture_states(states: Iterable[LeafState]) -> list[CapturedState]:
    """Capture states without reading their bytes. Not collective.

    On a device their bytes are those after all work that it has been given by now.

    Raises:
        StageError: On the calling rank, if a state cannot be captured.
    """
    with following():
        return [_capture(state, state.capture) for state in states]


def capture_own_parts(states: Iterable[RankedState], *, cut: bool) -> list[CapturedState]:
    """Capture of each state the part of this rank alone. Not collective.

    Args:
        states: The states.
        cut: Whether this rank writes it itself, as cut leaves.

    Raises:
        StageError: On the calling rank, if a part cannot be captured.
    """
    with following():
        return [_capture(state, partial(state.capture_own, cut=cut)) for state in states]


def _capture(state: LeafState, capture: Callable[[], Capture]) -> CapturedState:
    with concerning(f"state {state.name!r}"):
        captured = capture()
        form = state.form_of(captured.whole_specs)
    return CapturedState(state, captured.structure, captured.whole, form, cut=captured.cut)


def digest_states(captured: Sequence[CapturedState], threads: int) -> list[CapturedState]:
    """Digest the states not yet digested, all leaves in parallel.

    Not collective. Only leaves that are not contiguous host memory are copied, at most
    ``threads`` of them at a time.

    Args:
        captured: The states.
        threads: Threads that hash.
    """
    todo = [content for content in captured if content.digests is None]
    if not todo:
        return list(captured)
    leaves: Sequence[Leaf] = todo[0].leaves
    if len(todo) > 1:
        leaves = list(chain.from_iterable(content.leaves for content in todo))
    sizes = np.concatenate([content.form.sizes for content in todo])
    try:
        taken = digest_leaves(leaves, sizes, threads)
    except Exception:
        # A parallel failure does not name its leaf: find the first leaf that fails alone.
        for content in todo:
            for leaf in content.leaves:
                with about_leaf(content, leaf):
                    leaf.buffer.read()
        raise
    ends = accumulate((len(content.leaves) for content in todo), initial=0)
    parts = iter([taken] if len(todo) == 1 else [taken[i:j] for i, j in pairwise(ends)])
    return [
        content if content.digests is not None else replace(content, digests=next(parts))
        for content in captured
    ]


def make_comparable(captured: Sequence[CapturedState], threads: int) -> list[CapturedState]:
    """Fingerprint the states with leaves on devices, and digest the others.

    Not collective. As `digest_states`.
    """
    return digest_rest(fingerprint_states(captured, threads), threads)


def digest_rest(captured: Sequence[CapturedState], threads: int) -> list[CapturedState]:
    """Digest the states that have no fingerprints either.

    Not collective. As `digest_states`.
    """
    rest = iter(digest_states([one for one in captured if not one.is_comparable], threads))
    return [one if one.is_comparable else next(rest) for one in captured]


def fingerprint_states(
    captured: Sequence[CapturedState], threads: int
) -> list[CapturedState]:
    """Fingerprint the states with leaves on devices, if they have no digests yet.

    Not collective. Their leaves in host memory are digested. Nothing is done if a device
    lacks the memory for it.

    Args:
        captured: The states.
        threads: Threads that hash.

    Raises:
        StageError: On the calling rank, if a device cannot do it.
    """
    places = {n: places_of(one) for n, one in enumerate(captured) if not one.is_comparable}
    places = {number: of_state for number, of_state in places.items() if any(of_state)}
    found = list(captured)
    if not places:
        return found
    leaves = [leaf for number in places for leaf in captured[number].leaves]
    is_there = np.frombuffer(b"".join(places.values()), np.uint8) != 0
    try:
        made = fingerprint_leaves([leaves[n] for n in np.flatnonzero(is_there)])
    except Exception as error:
        names = ", ".join(repr(captured[number].name) for number in places)
        raise StageError(f"states {names}, on a device: {error!r}") from error
    if made is None:
        return found
    others = [leaves[n] for n in np.flatnonzero(~is_there)]
    sizes = np.array([leaf.spec.nbytes for leaf in others], np.int64)
    rows = np.empty((len(leaves), 2), np.uint64)
    rows[is_there] = np.frombuffer(b"".join(made), np.uint64).reshape(-1, 2)
    rows[~is_there] = digest_leaves(others, sizes, threads).rows
    end = 0
    for number, of_state in places.items():
        start, end = end, end + len(of_state)
        known = Fingerprints(rows[start:end].tobytes(), of_state)
        found[number] = replace(captured[number], fingerprints=known)
    return found


def places_of(captured: CapturedState) -> bytes:
    """Return for each leaf one byte, whether it can be fingerprinted; nothing if none can.

    Not collective.
    """
    buffers = [leaf.buffer for leaf in captured.leaves]
    kinds = {kind for kind in set(map(type, buffers)) if hasattr(kind, "fingerprint_all")}
    return bytes([type(buffer) in kinds for buffer in buffers]) if kinds else b""


def digest_leaves(
    leaves: Sequence[Leaf], sizes: NDArray[np.int64], threads: int
) -> Digests:
    """Digest leaves; see `digest_many`. Not collective.

    Args:
        leaves: Whole leaves.
        sizes: The bytes of each.
        threads: Threads that hash.
    """
    return digest_many(
        lambda first, last: read_leaves(leaves, first, last),
        sizes,
        threads,
        pieces_of=lambda number: pieces_of(leaves[number]),
    )


@contextmanager
def about_leaf(captured: CapturedState, leaf: Leaf) -> Iterator[None]:
    """Add to an error from the block which leaf it concerns. Not collective.

    For the rare case: a block around each of thousands of leaves would be slow.
    """
    with concerning(f"state {captured.name!r}"), concerning(f"leaf {leaf.spec.name!r}"):
        yield


def digest_of(captured: Iterable[CapturedState]) -> bytes:
    """Return one digest of the contents of some digested states. Not collective."""
    return digest_bytes(
        b"".join(digest for content in captured for digest in content.summary())
    )


def pick_leaves(captured: CapturedState, numbers: Sequence[int]) -> CapturedState:
    """Return a state with only some of its leaves. Not collective. Thread-safe."""
    leaves, digests = captured.leaves, captured.digests
    fingerprints = captured.fingerprints
    if len(numbers) == len(leaves):
        return captured
    return replace(
        captured,
        leaves=tuple([leaves[n] for n in numbers]),
        form=captured.form.pick(numbers),
        digests=None if digests is None else digests.pick(numbers),
        fingerprints=None if fingerprints is None else fingerprints.pick(numbers),
    )
