# SPDX-License-Identifier: Apache-2.0
"""Copies the contents of a save, from hosts or devices, so that training can go on."""

from __future__ import annotations

import io
import mmap
from collections import deque
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.devices import land
from mpi_ckpt.engine.save.cut.own_tiles import CapturedTiles
from mpi_ckpt.engine.save.shard import ShardImage, plan_of
from mpi_ckpt.engine.sync.captured import CapturedState, about_leaf, digest_leaves
from mpi_ckpt.errors import StageError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.digest import BlockHasher, Digest, Digests, copy_many
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, MemoryBuffer
from mpi_ckpt.memory import round_up
from mpi_ckpt.state import State
from mpi_ckpt.storage.format.manifest import STREAM
from mpi_ckpt.storage.format.tile_table import file_order

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from typing import BinaryIO

    from mpi_ckpt.devices import Copy
    from mpi_ckpt.engine.save.shard import ShardPlan
    from mpi_ckpt.leaves.leaf import Gate
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


# Leaves of so many bytes are worth a thread.
_DIRECT_BYTES = 256 << 10


class StagedStream(State):
    """The stream of a plain state, kept in memory."""

    def __init__(self, name: str, data: memoryview) -> None:
        super().__init__(name)
        self._data = data

    @property
    def nbytes(self) -> int:
        """Size of the stream in bytes."""
        return self._data.nbytes

    def leaf(self) -> Leaf:
        """Return the stream as a leaf of bytes. Not collective. Thread-safe."""
        return Leaf(LeafSpec(STREAM, "U8", (self.nbytes,)), MemoryBuffer(self._data))

    def save(self, fileobj: BinaryIO) -> None:
        """Write the stream to a file. Not collective. Thread-safe."""
        fileobj.write(self._data)


@dataclass(frozen=True, slots=True)
class _LateCopy:
    leaf: Leaf
    place: memoryview
    stamp: int
    digest: Digest | None

    def make(self) -> bool:
        """Copy; return whether the copy has the digest of the bytes at the save."""
        # INVARIANT: no digest of other bytes than those written gets into a manifest.
        if self.digest is None:
            self.leaf.buffer.copy_to(self.place)
            return True
        if is_on_device(self.leaf):
            return land_leaves([self.leaf], [self.place], digested=True) == [self.digest]
        view = None
        if self.leaf.spec.nbytes >= _DIRECT_BYTES:
            view = self.leaf.buffer.view()
        if view is None:
            self.leaf.buffer.copy_to(self.place)
            return Digest.of(self.place) == self.digest
        return copy_many([(view, self.place)], 1, digested=True) == [self.digest]

    def is_stale(self) -> bool:
        """Return whether torch has noticed a change since the save."""
        return self.leaf.buffer.stamp() != self.stamp


class LateCopies:
    """Copies of leaves behind a gate, which are made in the background.

    Not collective. Filled on the main thread, made on another thread.
    """

    def __init__(self) -> None:
        self._leaves: list[Leaf] = []
        self._places: list[memoryview] = []
        self._stamps: list[int] = []
        self._digests: list[Digest | None] = []
        self._copied: Callable[[], None] | None = None

    def __bool__(self) -> bool:
        return bool(self._leaves)

    @property
    def gates(self) -> set[Gate]:
        """The gates that block changes until `copy` has ended."""
        return {leaf.gate for leaf in self._leaves if leaf.gate is not None}

    def add(
        self,
        leaves: Sequence[Leaf],
        places: Sequence[memoryview],
        digests: Sequence[Digest | None],
    ) -> None:
        """Add leaves, the destination of each, and its digest if already taken.

        The training waits: of thousands of leaves only the stamps are taken at once.
        """
        self._stamps += [leaf.buffer.stamp() for leaf in leaves]
        self._leaves += leaves
        self._places += places
        self._digests += digests

    def when_copied(self, act: Callable[[], None]) -> None:
        """Call a function after `copy` succeeds; at once if there is nothing to copy."""
        if self._leaves:
            self._copied = act
        else:
            act()

    def copy(self) -> None:
        """Make the added copies.

        Raises:
            StageError: On the calling rank, with the names of leaves that other code
                changed meanwhile without passing the gate.
        """
        columns = self._leaves, self._places, self._stamps, self._digests
        copies = list(map(_LateCopy, *columns))
        proven = [copy.make() for copy in copies]
        changed = [
            copy.leaf.spec.name
            for copy, is_proven in zip(copies, proven, strict=True)
            if not is_proven or copy.is_stale()
        ]
        if changed:
            raise StageError(
                "changed while they were being copied, not by an optimizer's step(): "
                f"{', '.join(changed)}. Nothing of this save is kept; change them after "
                "step(), or save without overlap",
                problems=changed,
            )
        if self._copied is not None:
            self._copied()


@dataclass(frozen=True, slots=True)
class Staged:
    """Copies of states.

    Attributes:
        states: The same states, over private memory.
        late: Copies still to be made.
        image: The file of the whole leaves; None if there are none.
    """

    states: list[CapturedState | State]
    late: LateCopies
    image: ShardImage | None


@dataclass(frozen=True, slots=True)
class _ArenaLayout:
    """Where copies lie in the arena.

    Attributes:
        plan: The layout of the file of whole leaves; None if there are none.
        offsets: Index of a captured state -> the offset of each of its leaves.
        nbytes: Length of it all.
    """

    plan: ShardPlan | None
    offsets: Mapping[int, Sequence[int]]
    nbytes: int


def stage(
    arena: Arena,
    states: Sequence[CapturedState | State],
    *,
    threads: int = 1,
    digested: Collection[str] = (),
) -> Staged:
    """Copy states so that they may change while the copies are written.

    Not collective. Called on ranks that write. One copy of every leaf, which lies in the
    arena as it will in its file; plain states write themselves into memory. Leaves behind a
    gate are left for later.

    Args:
        arena: Holds the leaves; an earlier copy in it is lost.
        states: Captured leaf states, and plain states, in saving order.
        threads: Threads that copy.
        digested: Names of the states to digest in the same pass.

    Returns:
        The copies. No code may pass the gates of the late ones before these are made.

    Raises:
        StageError: On the calling rank, if memory is short or a state's ``save`` fails.
        SaveError: On the calling rank, if the header of a file would be too large to read.
    """
    layout = _lay_out(states)
    memory = _take(arena, layout.nbytes, states)
    return _stage_into(memory, layout, states, threads, digested)


def stage_files(
    arena: Arena,
    files: Sequence[Sequence[CapturedState]],
    threads: int,
    places: Sequence[memoryview] = (),
) -> list[Staged]:
    """Copy the leaves of several files at once, none for later, and digest the copies.

    Not collective.

    Args:
        arena: Holds the leaves, a file after the other; an earlier copy in it is lost.
        files: The captured states of each.
        threads: Threads that copy.
        places: The memory for each file, as long as it is, instead of the arena.

    Raises:
        StageError: On the calling rank, if memory is short.
        SaveError: On the calling rank, if the header of a file would be too large to read.
    """
    at_once = [[_without_gates(state) for state in states] for states in files]
    layouts = [_lay_out(states) for states in at_once]
    if not places:
        sizes = [round_up(one.nbytes, mmap.PAGESIZE) for one in layouts]
        memory = _take(arena, sum(sizes), [one for of in at_once for one in of])
        ends = accumulate(sizes)
        places = [memory[n - size : n] for n, size in zip(ends, sizes, strict=True)]
    return [
        _stage_into(place, layout, states, threads, [state.name for state in states])
        for place, layout, states in zip(places, layouts, at_once, strict=True)
    ]


def _without_gates(state: CapturedState) -> CapturedState:
    """Let the leaves of a state be copied now."""
    if all(leaf.gate is None for leaf in state.leaves):
        return state
    return replace(state, leaves=tuple([replace(one, gate=None) for one in state.leaves]))


def _stage_into(
    memory: memoryview,
    layout: _ArenaLayout,
    states: Sequence[CapturedState | State],
    threads: int,
    digested: Collection[str],
) -> Staged:
    late = LateCopies()
    staged: list[CapturedState | State] = []
    for index, state in enumerate(states):
        if not isinstance(state, CapturedState):
            staged.append(_stage_stream(state))
            continue
        offsets = zip(layout.offsets[index], state.specs, strict=True)
        places = [memory[offset : offset + spec.nbytes] for offset, spec in offsets]
        wants = state.digests is None and state.name in digested
        digests = _copy(state, places, late, threads, digested=wants)
        leaves = [
            Leaf(spec, MemoryBuffer(place))
            for spec, place in zip(state.specs, places, strict=True)
        ]
        staged.append(replace(state, leaves=tuple(leaves), digests=digests))
    image = None
    if layout.plan is not None:
        memory[: len(layout.plan.header)] = layout.plan.header
        image = ShardImage(layout.plan, memory)
    return Staged(staged, late, image)


def _lay_out(states: Sequence[CapturedState | State]) -> _ArenaLayout:
    """Lay out whole leaves as in their file, and behind them tiles as in theirs."""
    captured = {n: one for n, one in enumerate(states) if isinstance(one, CapturedState)}
    whole = [n for n, one in captured.items() if not isinstance(one, CapturedTiles)]
    offsets = {index: [0] * len(state.leaves) for index, state in captured.items()}
    plan, end = None, 0
    if any(captured[index].leaves for index in whole):
        plan = plan_of([captured[index] for index in whole])
        last = 0
        for index in whole:
            first, last = last, last + len(captured[index].leaves)
            offsets[index] = plan.offsets[first:last].tolist()
        end = round_up(plan.nbytes, mmap.PAGESIZE)
    entries = {
        (index, number): entry
        for index, state in captured.items()
        if isinstance(state, CapturedTiles)
        for number, entry in enumerate(state.entries)
    }
    keys = list(entries)
    # The header of their file ends at a page boundary as well.
    for index, number in (keys[at] for at in file_order(list(entries.values()))):
        offsets[index][number] = end
        end += entries[index, number].nbytes
    return _ArenaLayout(plan, offsets, end)


def _copy(
    state: CapturedState,
    places: Sequence[memoryview],
    late: LateCopies,
    threads: int,
    *,
    digested: bool,
) -> Digests | None:
    """Copy the leaves of a state, or leave them for later; return their digests."""
    taken: dict[int, Digest] = dict(enumerate(state.digests or ()))
    flying, direct = [], {}
    gated = [n for n, leaf in enumerate(state.leaves) if leaf.gate is not None]
    rest = sorted(set(range(len(places))) - set(gated))
    for number, leaf, place in [(n, state.leaves[n], places[n]) for n in rest]:
        if is_on_device(leaf):
            flying.append(number)
            continue
        try:
            source = leaf.buffer.view() if leaf.spec.nbytes >= _DIRECT_BYTES else None
            if source is not None:
                direct[number] = source, place
                continue
            leaf.buffer.copy_to(place)
        except Exception:
            with about_leaf(state, leaf):
                raise
        if digested:
            taken[number] = Digest.of(place)
    with concerning(f"state {state.name!r}"):
        require_gates([state.leaves[number] for number in gated])
    taken |= _land(state, flying, places, digested=digested)
    copied = copy_many(list(direct.values()), threads, digested=digested)
    taken |= dict(zip(direct, copied, strict=False))
    if digested and gated:
        leaves = [state.leaves[number] for number in gated]
        sizes = np.array([leaf.spec.nbytes for leaf in leaves])
        taken |= dict(zip(gated, digest_leaves(leaves, sizes, threads), strict=True))
    late.add(
        [state.leaves[number] for number in gated],
        [places[number] for number in gated],
        [taken.get(number) for number in gated],
    )
    if not digested and state.digests is None:
        return None
    return Digests.of([taken[number] for number in range(len(places))])


def _land(
    state: CapturedState,
    numbers: Sequence[int],
    places: Sequence[memoryview],
    *,
    digested: bool,
) -> dict[int, Digest]:
    """Copy some leaves of a state from devices; return their digests, if wanted."""
    leaves = [state.leaves[number] for number in numbers]
    with concerning(f"state {state.name!r}"):
        found = land_leaves(
            leaves, [places[number] for number in numbers], digested=digested
        )
    return dict(zip(numbers, found, strict=False))


def _stage_stream(state: State) -> StagedStream:
    stream = io.BytesIO()
    try:
        state.save(stream)
    except Exception as error:
        raise StageError(f"save() of state {state.name!r}: {error!r}") from error
    return StagedStream(state.name, stream.getbuffer())


def _take(arena: Arena, nbytes: int, states: Sequence[CapturedState | State]) -> memoryview:
    captured = [state for state in states if isinstance(state, CapturedState)]
    try:
        memory = arena.take(nbytes)
    except OSError as error:
        nbytes = sum(spec.nbytes for state in captured for spec in state.specs)
        raise StageError(
            f"no memory to stage a save: {nbytes} bytes are needed ({error}); "
            "Options(asynchronous=False) saves without a copy"
        ) from error
    pin_for(arena, [leaf for state in captured for leaf in state.leaves])
    return memory
