# SPDX-License-Identifier: Apache-2.0
"""Finds which tiles of cut leaves each rank writes; replicas of a tile must be equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.comm import agree, any_of, gather_bytes, scatter_bytes
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.engine.save.cut.cut_forms import (
    Assignment,
    JoinedForms,
    TileNumber,
    encode_forms,
    join_forms,
)
from mpi_ckpt.engine.save.cut.own_tiles import CapturedTiles
from mpi_ckpt.engine.sync.captured import about_leaf
from mpi_ckpt.errors import DivergedError, StageError, cut_lines
from mpi_ckpt.failures import name_ranks
from mpi_ckpt.leaves.digest import DIGEST_BYTES, Digest, Digests
from mpi_ckpt.leaves.leaf import Form, Leaf, LeafSpec
from mpi_ckpt.storage.format.tile_table import TileEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.options import Options

_DOING = "comparing how leaves are cut over the ranks"
_PROBLEMS_MAX = 16


@dataclass(frozen=True, slots=True)
class TileSurvey:
    """How the cut leaves lie on the ranks. It holds as long as no rank's tiles change.

    Attributes:
        forms: What this rank has of them, encoded.
        mine: What this rank writes.
        joined: What root knows of all ranks; None elsewhere.
        has_replicas: Whether any tile is on several ranks; the same on every rank.
    """

    forms: bytes
    mine: Assignment
    joined: JoinedForms | None
    has_replicas: bool


def survey_tiles(
    comm: Communicator,
    captured: Sequence[CapturedState],
    previous: TileSurvey | None,
    options: Options,
    writers: Sequence[int] | None = None,
) -> TileSurvey:
    """Find which tiles each rank writes.

    Collective. Main thread only. One allreduce of 56 bytes, if no rank's tiles have
    changed since the previous survey.

    Args:
        comm: The communicator.
        captured: The contents of this rank.
        previous: The previous survey of this manager, if any.
        options: The manager's, the same in each survey.
        writers: The rank that takes the tiles of each rank; None: as the options say.

    Raises:
        StageError: On every rank, if the tiles of all ranks do not make whole leaves.
    """
    forms = encode_forms(captured)
    (is_other,) = any_of(comm, _DOING, previous is None or previous.forms != forms)
    if previous is not None and not is_other:
        return previous
    gathered = gather_bytes(comm, forms, _DOING)
    takers = writers or _writers(comm, options)

    def join() -> JoinedForms | None:
        return join_forms(gathered, comm.hosts, takers) if comm.is_root else None

    joined = agree(comm, _DOING, join, error=StageError)
    encoded = [] if joined is None else [one.encode() for one in joined.assignments]
    window = options.io.window_bytes
    mine = scatter_bytes(comm, encoded, _DOING, window_bytes=window)
    (has_replicas,) = any_of(comm, _DOING, bool(joined and joined.replicas))
    return TileSurvey(forms, Assignment.decode(mine), joined, has_replicas)


def _writers(comm: Communicator, options: Options) -> list[int]:
    """Return the rank that writes the tiles of each rank. Not collective.

    Each rank writes its own, or with ``writers="node"`` the first rank of its host. While a
    training goes on, ranks hand over nothing: then each writes its own.
    """
    if options.writers != "node" or options.asynchronous:
        return list(range(comm.size))
    return [comm.topology.leaders[node] for node in comm.topology.node_of]


def take_tiles(
    comm: Communicator,
    captured: Sequence[CapturedState],
    survey: TileSurvey,
    *,
    compared: bool = True,
) -> list[CapturedTiles]:
    """Return the tiles that this rank writes, after replicas were proven equal.

    Collective if replicas are compared. Main thread only. A tile that several ranks have
    is then digested by each of them, and root compares the digests: 16 bytes a tile and
    rank.

    Args:
        comm: The communicator.
        captured: The contents of this rank.
        survey: Their survey.
        compared: Whether to compare replicas; if not, one is as good as another.

    Raises:
        DivergedError: On every rank, if two ranks have different bytes for one tile.
        StageError: On every rank, if any rank cannot read a tile.
    """
    leaves = [(one, leaf) for one in captured for leaf in one.cut]
    digests: dict[TileNumber, Digest] = {}
    if survey.has_replicas and compared:
        digests = _compare_replicas(comm, leaves, survey)
    taken: dict[tuple[str, bool], list[tuple[Leaf, TileEntry, Digest | None]]] = {}
    states = {one.name: one for one in captured}
    for index in survey.mine.owned:
        one, leaf = leaves[index.form]
        entry = _entry_of(one, leaf, index, survey.mine)
        buffer = (leaf.tiles or ())[index.tile].buffer
        spec = LeafSpec(leaf.spec.name, leaf.spec.dtype, entry.box.shape)
        digest = digests.get(index)
        taken.setdefault((one.name, digest is None), []).append(
            (Leaf(spec, buffer, leaf.gate), entry, digest)
        )
    return [
        CapturedTiles(
            states[name].state,
            None,
            tuple([leaf for leaf, _, _ in tiles]),
            Form(leaf.spec for leaf, _, _ in tiles),
            None if is_new else Digests.of([digest for _, _, digest in tiles if digest]),
            entries=tuple([entry for _, entry, _ in tiles]),
        )
        for (name, is_new), tiles in taken.items()
    ]


def _entry_of(
    one: CapturedState, leaf: Leaf, index: TileNumber, mine: Assignment
) -> TileEntry:
    """Return the place of a tile in the whole leaf."""
    spec, box = leaf.spec, (leaf.tiles or ())[index.tile].box
    if index.form in mine.rows:
        rows, first = mine.rows[index.form]
        spec = LeafSpec(spec.name, spec.dtype, (rows, *spec.shape[1:]))
        box = Box((first, *box.offset[1:]), box.shape)
    return TileEntry(one.name, spec, box)


def _compare_replicas(
    comm: Communicator, leaves: Sequence[tuple[CapturedState, Leaf]], survey: TileSurvey
) -> dict[TileNumber, Digest]:
    """Return the digests of this rank's tiles that other ranks have as well."""

    def digest() -> dict[TileNumber, Digest]:
        found = {}
        for index in survey.mine.compared:
            one, leaf = leaves[index.form]
            with about_leaf(one, leaf):
                found[index] = Digest.of((leaf.tiles or ())[index.tile].buffer.read())
        return found

    mine = agree(comm, _DOING, digest, error=StageError)
    gathered = gather_bytes(comm, b"".join(one.whole for one in mine.values()), _DOING)

    def compare() -> None:
        if survey.joined is not None:
            _refuse_differing(comm, survey.joined, gathered)

    agree(comm, _DOING, compare, error=StageError)
    return mine


def _refuse_differing(
    comm: Communicator, joined: JoinedForms, gathered: Sequence[bytes]
) -> None:
    digests = [
        {
            index: data[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]
            for place, index in enumerate(assignment.compared)
        }
        for assignment, data in zip(joined.assignments, gathered, strict=True)
    ]
    problems = [
        f"state {one.state!r}, leaf {one.leaf!r}, {one.box}: "
        f"{name_ranks([one.rank], comm.hosts)} differs from rank {one.owner}"
        for one in joined.replicas
        if digests[one.rank][one.tile] != digests[one.owner][one.owned]
    ]
    if problems:
        raise DivergedError(
            "ranks that have the same box of a leaf have other bytes in it, nothing was "
            "saved:\n  " + cut_lines("\n  ".join(problems), _PROBLEMS_MAX),
            problems=problems,
        )
