# SPDX-License-Identifier: Apache-2.0
"""Plans a local generation: its files, the hosts that hold them, its manifest. No MPI.

Root alone knows the bytes of plain states, and with a copy in memory those of all ranks'
parts: these files are *bound* to it. It sends their description, a small manifest, and that
of the files of tiles, from which each leader lays out the same files. The digests that the
whole manifest needs are taken while the leaves are copied or written.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from mpi_ckpt.engine.hosts.placement import (
    count_copies,
    count_shares,
    place_files,
    place_own_files,
)
from mpi_ckpt.engine.save.shard import (
    encode_shard,
    foresee_file,
    foresee_leaf_file,
    plan_of,
)
from mpi_ckpt.engine.save.sharing import pick_share, split_by_bytes
from mpi_ckpt.engine.sync.captured import CapturedState, digest_states
from mpi_ckpt.errors import StageError
from mpi_ckpt.leaves.digest import Digest, digest_bytes
from mpi_ckpt.options import ROOT
from mpi_ckpt.storage.format.layout import (
    shard_file_name,
    share_file_name,
    stream_file_name,
)
from mpi_ckpt.storage.format.manifest import (
    Extent,
    LocalSet,
    Manifest,
    StoredFile,
    StoredLeaves,
    StoredState,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.engine.hosts.host_tiles import HostTiles
    from mpi_ckpt.engine.hosts.level import HostNames
    from mpi_ckpt.engine.save.shard import Shard
    from mpi_ckpt.leaves.leaf import Form
    from mpi_ckpt.state import State

_NO_HEADER = digest_bytes(b"")


@dataclass(frozen=True, slots=True)
class Share:
    """The leaves of one share.

    Attributes:
        numbers: State -> indices of its leaves.
        forms: State -> the form of these leaves.
    """

    numbers: Mapping[str, Sequence[int]]
    forms: Mapping[str, Form]

    def pick(self, equal: Sequence[CapturedState]) -> list[CapturedState]:
        """Return these leaves of some states. Not collective. Thread-safe."""
        return [
            replace(one, form=self.forms[one.name])
            for one in pick_share(equal, self.numbers)
        ]


@dataclass(frozen=True, slots=True)
class BoundFiles:
    """The files whose bytes only root knows.

    Attributes:
        data: Name -> bytes.
        files: Their entries in the manifest.
        states: The states that lie in them.
    """

    data: Mapping[str, bytes]
    files: tuple[StoredFile, ...]
    states: tuple[StoredState, ...]


@dataclass(frozen=True, slots=True)
class SharePlan:
    """A local generation as every leader plans it.

    Attributes:
        outline: Its manifest, but for the states that all ranks have.
        names: Names of all states, in saving order.
        shares: File name -> the leaves in it, of each share.
        bound: Names of the files whose bytes only root knows.
        tiles: The files of tiles.
        holders: File name -> the hosts that hold it.
    """

    outline: Manifest
    names: Sequence[str]
    shares: Mapping[str, Share]
    bound: tuple[str, ...]
    tiles: HostTiles
    holders: Mapping[str, tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of all files on all hosts, without manifests."""
        files = self.outline.files
        return sum(file.nbytes * len(self.holders[file.name]) for file in files)

    def manifest(self, equal: Sequence[CapturedState]) -> Manifest:
        """Return the whole manifest. Not collective. Thread-safe.

        Args:
            equal: The contents that all ranks have, digested.
        """
        outline = self.outline
        sent = {state.name: state for state in outline.states}
        shards = []
        for name, share in self.shares.items():
            shard = foresee_leaf_file(share.pick(equal), name, outline.generation)
            shards += [shard] if shard is not None else []
        stored = {}
        for one in equal:
            of_root = sent.get(one.name)
            taken = one if of_root is None else replace(one, structure=of_root.structure)
            stored[one.name] = _with_tiles(_stored(taken, shards), self.tiles)
        states = tuple([stored.get(name) or sent[name] for name in self.names])
        return replace(outline, states=states)

    def held_by(self, host: int) -> list[StoredFile]:
        """Return the files that a host holds. Not collective. Thread-safe.

        Args:
            host: Index of the host.
        """
        return [one for one in self.outline.files if host in self.holders[one.name]]

    def receivers(self, name: str) -> tuple[int, ...]:
        """Return the hosts to which root sends a bound file. Not collective."""
        return tuple(host for host in self.holders[name] if host != ROOT)


def encode_bound(
    states: Sequence[CapturedState | State], generation: int, threads: int
) -> BoundFiles:
    """Encode the states whose bytes only root knows. Not collective. Root only.

    Args:
        states: These states: plain ones, and captured ones with a part for each rank.
        generation: Number of the generation.
        threads: Threads that hash.

    Raises:
        StageError: On the calling rank, if a state cannot give its contents.
    """
    data: dict[str, bytes] = {}
    files: list[StoredFile] = []
    stored: list[StoredState] = []
    for state in states:
        if isinstance(state, CapturedState):
            continue
        stream = io.BytesIO()
        try:
            state.save(stream)
        except Exception as error:
            raise StageError(f"save() of state {state.name!r}: {error!r}") from error
        name, text = stream_file_name(state.name), stream.getvalue()
        extent, digest = Extent(name, 0, len(text)), Digest.of(memoryview(text))
        data[name] = text
        files.append(StoredFile(name, len(text), 0, _NO_HEADER, generation))
        stored.append(StoredState.of_stream(state.name, extent, digest))
    captured = [state for state in states if isinstance(state, CapturedState)]
    captured = digest_states(captured, threads)
    shard = foresee_leaf_file(captured, shard_file_name(ROOT), generation)
    if shard is not None:
        data[shard.file.name] = encode_shard(captured)
        files.append(shard.file)
    stored += [_stored(content, [shard] if shard else []) for content in captured]
    return BoundFiles(data, tuple(files), tuple(stored))


def plan_shares(
    part: Manifest,
    tiles: HostTiles,
    names: Sequence[str],
    equal: Sequence[CapturedState],
    hosts: HostNames,
    copies: int | None,
) -> SharePlan:
    """Make the plan of a generation from what root has sent.

    Not collective. Every leader makes the same plan of it. No digest is needed for it.

    Args:
        part: The manifest of the bound files alone; also the structures of states that a
            sync has made equal, and of states with tiles.
        tiles: The files of tiles of all hosts.
        names: Names of all states, in saving order.
        equal: The contents that all ranks have.
        hosts: The hosts.
        copies: How many hosts shall hold each file; None for one in each domain.
    """
    assert part.local is not None
    count = count_copies(copies, hosts.domains)
    forms = tuple([(one.name, one.form) for one in equal])
    shares = _cut(forms, count_shares(len(hosts.names), count))
    made = [
        foresee_file(plan_of(share.pick(equal)), name, part.generation)
        for name, share in shares.items()
    ]
    files = (*part.files, *tiles.files, *made)
    holders = _place(files, len(part.files), tiles, hosts, count)
    local = LocalSet(
        part.local.run,
        part.local.base,
        part.local.directory,
        hosts.names,
        hosts.domains,
        count,
        tuple(holders),
    )
    states = tuple([_with_tiles(state, tiles) for state in part.states])
    return SharePlan(
        replace(part, files=files, states=states, local=local),
        names,
        shares,
        tuple(file.name for file in part.files),
        tiles,
        dict(zip([file.name for file in files], holders, strict=True)),
    )


def _place(
    files: Sequence[StoredFile],
    bound: int,
    tiles: HostTiles,
    hosts: HostNames,
    copies: int,
) -> list[tuple[int, ...]]:
    """Choose the holders of bound files, of tiles and of shares, in this order."""
    own = place_own_files(tiles.hosts, hosts.names, hosts.domains, copies)
    loads = [0] * len(hosts.names)
    for file, holders in zip(tiles.files, own, strict=True):
        for host in holders:
            loads[host] += file.nbytes
    rest = [*files[:bound], *files[bound + len(own) :]]
    placed = place_files(
        [file.nbytes for file in rest],
        hosts.names,
        hosts.domains,
        copies,
        bound=[ROOT] * bound,
        loads=loads,
    )
    return [*placed[:bound], *own, *placed[bound:]]


def _with_tiles(state: StoredState, tiles: HostTiles) -> StoredState:
    cut = tiles.leaves.get(state.name, ())
    return replace(state, cut=cut, files=tiles.names.get(state.name, ())) if cut else state


@lru_cache(maxsize=2)  # forms, and so shares, usually stay the same from save to save
def _cut(forms: tuple[tuple[str, Form], ...], count: int) -> dict[str, Share]:
    """Cut the leaves of all states into shares of about equal size."""
    leaves = [
        ((name, number), spec.nbytes)
        for name, form in forms
        for number, spec in enumerate(form.specs)
    ]
    shares: dict[str, Share] = {}
    for part in split_by_bytes(leaves, count):
        numbers: dict[str, list[int]] = {}
        for name, number in part:
            numbers.setdefault(name, []).append(number)
        if numbers:
            picked = {n: form.pick(numbers[n]) for n, form in forms if n in numbers}
            shares[share_file_name(len(shares))] = Share(numbers, picked)
    return shares


def _stored(content: CapturedState, shards: Sequence[Shard]) -> StoredState:
    name = content.name
    parts = [shard.states[name] for shard in shards if name in shard.states]
    leaves = StoredLeaves.joined(content.form, parts)
    return StoredState(name, content.structure, leaves)
