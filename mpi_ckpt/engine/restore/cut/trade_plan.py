# SPDX-License-Identifier: Apache-2.0
"""Plans how leaves that are cut over ranks, in the files or in the program, arrive.

Root plans which rank reads which run of a file, and to whom its parts go, and sends each
rank its own part of the plan: what other ranks hold grows with their neighbours only.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import agree, choose_ranks, gather_bytes, meet, scatter_bytes
from mpi_ckpt.decomposition.rank_plan import RankPlan
from mpi_ckpt.decomposition.reshard import plan_reshard
from mpi_ckpt.engine.restore.cut.traded_parts import join_part_wants, traded_states
from mpi_ckpt.engine.restore.cut.wanted import (
    LeafIndex,
    encode_wants,
    join_wants,
    tiles_of_files,
)
from mpi_ckpt.errors import (
    CheckpointError,
    CorruptGenerationError,
    ReadError,
    RestoreError,
    StateMismatchError,
)
from mpi_ckpt.leaves.digest import DIGEST_BYTES
from mpi_ckpt.options import ROOT
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.format.manifest import StoredFile
from mpi_ckpt.storage.reading.file_reader import FileReader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.engine.restore.cut.traded_parts import PartForm
    from mpi_ckpt.engine.restore.cut.wanted import Wants
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.storage.reading.reader import GenerationReader


_DOING = "sharing out the lists of tiles"
_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class TileHeaders:
    """The headers that one rank has read.

    Attributes:
        encoded: For `join_tile_headers`.
        failure: Why one could not be read here; None if all could.
    """

    encoded: bytes = b""
    failure: CheckpointError | None = None

    def refuse(self) -> None:
        """Raise the failure, which root has found to be this rank's own. Not collective.

        Raises:
            ReadError: On the calling rank, if there was any.
        """
        failure = self.failure
        if failure is not None:
            raise ReadError(
                f"{failure}. Root can open it; state that is cut over ranks needs a "
                "directory that all ranks see and may read",
                path=failure.path,
                errno=failure.errno,
            ) from failure


def read_tile_headers(session: Session, found: OpenGeneration) -> TileHeaders:
    """Read and prove this rank's share of the headers.

    Collective. Main thread only. A header that cannot be read here is left to root.

    Args:
        session: The manager's.
        found: The generation, open on root.

    Raises:
        RestoreError: On every rank, if root cannot share them out.
    """
    comm, reader = session.comm, found.reader if session.comm.is_root else None
    unproven = [] if reader is None else reader.unproven
    shares = [
        json.dumps([file.to_json() for file in unproven[rank :: comm.size]]).encode()
        for rank in range(comm.size if comm.is_root else 0)
    ]
    window_bytes = session.options.io.window_bytes
    mine = scatter_bytes(comm, shares, _DOING, window_bytes=window_bytes)
    path = session.directory.root / generation_name(found.outline.generation)
    headers: list[bytes | None] = []
    failure: CheckpointError | None = None
    with FileReader(path, found.outline.generation) as files:
        for values in json.loads(mine):
            try:
                header = files.read_header(StoredFile.from_json(values))
                headers.append(header.rstrip(b" "))  # filled up, to align what follows
            except CheckpointError as error:
                headers.append(None)
                failure = error
    lengths = [None if header is None else len(header) for header in headers]
    parts = [json.dumps(lengths).encode(), b"\n", *(one or b"" for one in headers)]
    return TileHeaders(b"".join(parts), failure)


def join_tile_headers(reader: GenerationReader, encoded: Sequence[bytes]) -> bool:
    """Give all headers to root's reader. Not collective. On root.

    Args:
        reader: The open generation.
        encoded: What each rank has read, in rank order.

    Returns:
        Whether root could read all that another rank could not: the fault is that rank's.

    Raises:
        CorruptGenerationError: On the calling rank, if a header is not the saved one, or
            the lists contradict the manifest.
        ReadError: On the calling rank, if root cannot read one either.
    """
    headers: dict[str, bytes] = {}
    is_out_of_sight = False
    for rank, data in enumerate(encoded):
        head, _, body = data.partition(b"\n")
        start = 0
        for file, length in zip(
            reader.unproven[rank :: len(encoded)], json.loads(head), strict=True
        ):
            end = start + (length or 0)
            header = body[start:end].ljust(file.header_bytes)
            headers[file.name], start = header, end
            if length is None:
                # Root's own error is that of a bad generation: then another is tried.
                headers[file.name] = _read_again(reader, file)
                is_out_of_sight = is_out_of_sight or rank != ROOT
    reader.take_headers(headers)
    return is_out_of_sight


def _read_again(reader: GenerationReader, file: StoredFile) -> bytes:
    try:
        return reader.read_header(file)
    except CorruptGenerationError:
        # A network file system may briefly show an old state.
        time.sleep(_PAUSE_SECONDS)
        return reader.read_header(file)


_PLANNING = "planning how tiles reach the ranks"
_OUT_OF_SIGHT = b"null"


@dataclass(frozen=True, slots=True)
class Trade:
    """What this rank does so that some tiles arrive.

    Attributes:
        plan: What this rank reads, sends and receives.
        files: Names of the files that this rank reads, by the plan's numbers.
        digests: The digest of each piece that this rank reads.
    """

    plan: RankPlan
    files: Mapping[int, str]
    digests: Sequence[bytes]

    @classmethod
    def decode(cls, data: bytes) -> Trade:
        """Return what `_plan_of_ranks` made for this rank. Not collective."""
        head, digests, plan = split(data)
        return cls(
            RankPlan.decode(plan),
            {int(number): name for number, name in json.loads(head).items()},
            [
                digests[start : start + DIGEST_BYTES]
                for start in range(0, len(digests), DIGEST_BYTES)
            ],
        )


@dataclass(frozen=True, slots=True)
class Trades:
    """How leaves that are cut over ranks arrive, and parts in files of tiles.

    Attributes:
        leaves: The leaves that arrive so; the same on every rank.
        unwanted: State -> names of its leaves that no rank wants; the same on every rank.
        of_leaves: What this rank does for them.
        with_parts: Names of the states whose parts arrive so; the same on every rank.
        part_forms: State -> the form of this rank's part, if there is one for it.
        of_parts: What this rank does for them; None if there are none.
    """

    leaves: frozenset[LeafIndex]
    unwanted: Mapping[str, tuple[str, ...]]
    of_leaves: Trade
    with_parts: tuple[str, ...]
    part_forms: Mapping[str, PartForm]
    of_parts: Trade | None

    @property
    def bytes_moved(self) -> int:
        """Bytes that this rank reads from files of tiles, or gets from other ranks."""
        parts = 0 if self.of_parts is None else self.of_parts.plan.bytes_moved
        return self.of_leaves.plan.bytes_moved + parts


def plan_trades(session: Session, found: OpenGeneration, match: StateMatch) -> Trades:
    """Find out what this rank reads, sends and receives.

    Collective. Main thread only. Nothing is changed. The ranks read the lists of tiles in
    turn.

    Args:
        session: The manager's.
        found: The generation, open on root.
        match: The states to restore, with this rank's destinations.

    Raises:
        StateMismatchError: On every rank, if no rank wants a leaf and options are strict.
        CorruptGenerationError: On every rank, if a list of tiles is damaged.
        ReadError: On every rank, if a rank cannot read one.
    """
    comm, options = session.comm, session.options
    # Of a local generation, root has had the headers since it was opened.
    headers = TileHeaders() if found.kept else read_tile_headers(session, found)
    mine = joined(encode_wants(match), headers.encoded)
    gathered = gather_bytes(comm, mine, _PLANNING)
    parts: list[bytes] = []

    def plan() -> bytes:
        if found.reader is None or not comm.is_root:
            return b""
        of_ranks = [split(one) for one in gathered]
        if found.reader.unproven and join_tile_headers(
            found.reader, [headers for _, headers in of_ranks]
        ):
            return _OUT_OF_SIGHT
        states = [matched.saved for matched in match.states]
        tiles = partial(tiles_of_files, found.reader, states)
        wants = join_wants(states, [wants for wants, _ in of_ranks], tiles)
        if options.strict:
            refuse_unwanted(found, wants)
        plans = [_plan_of_ranks(session, found, wants)]
        names = [state.name for _, state in traded_states(match, comm.size)]
        if names:
            of_parts = join_part_wants(found.reader, match, comm.size)
            plans.append([json.dumps(form).encode() for form in of_parts.forms])
            plans.append(_plan_of_ranks(session, found, of_parts.wants))
        parts.extend(joined(*of_rank) for of_rank in zip(*plans, strict=True))
        return json.dumps([sorted(wants.leaves), wants.unwanted, names]).encode()

    met = meet(comm, _PLANNING, plan, error=RestoreError, encode=bytes)
    if met.message == _OUT_OF_SIGHT:
        agree(comm, _PLANNING, headers.refuse, error=RestoreError)
    leaves, unwanted, names = json.loads(met.message)
    mine = scatter_bytes(
        comm,
        parts,
        _PLANNING,
        window_bytes=options.io.window_bytes,
    )
    of_leaves, *more = split(mine)
    return Trades(
        leaves=frozenset(LeafIndex(*leaf) for leaf in leaves),
        unwanted={state: tuple(names) for state, names in unwanted.items()},
        of_leaves=Trade.decode(of_leaves),
        with_parts=tuple(names),
        part_forms=json.loads(more[0]) if more else {},
        of_parts=Trade.decode(more[1]) if more else None,
    )


def refuse_unwanted(found: OpenGeneration, wants: Wants) -> None:
    """Refuse to leave out saved leaves. Not collective. On root.

    Raises:
        StateMismatchError: On the calling rank, with all leaves that no rank wants.
    """
    specs = {
        state.name: {leaf.name: leaf for leaf in state.leaves}
        for state in found.outline.states
    }
    problems = [
        f"{state}: {specs[state][name]} is saved, the program has no such leaf on any rank"
        for state, names in wants.unwanted.items()
        for name in names
    ]
    if problems:
        raise StateMismatchError(
            f"{found.outline.title} does not fit the program, nothing was changed:\n  "
            + "\n  ".join(problems),
            generation=found.outline.generation,
            problems=problems,
        )


def _plan_of_ranks(session: Session, found: OpenGeneration, wants: Wants) -> list[bytes]:
    """Return the trade of each rank: files, digests of what it reads, plan."""
    comm, io, kept = session.comm, session.options.io, found.kept
    holders = None if kept is None else [kept.holders[name] for name in wants.files]
    plan = plan_reshard(
        wants.saved,
        wants.wanted,
        itemsizes=wants.itemsizes,
        digest_bytes=found.outline.block_bytes,
        readers=readers_of_tiles(session) if kept is None else kept.readers,
        window_bytes=io.window_bytes,
        holders=holders,
    )
    parts = []
    for rank in range(comm.size):
        mine = plan.of_rank(rank)
        files = {number: wants.files[number] for number in set(mine.reads.file.tolist())}
        digests = [
            wants.stored[tile].leaf.digest.blocks[number]
            for tile, number in zip(
                mine.pieces.tile.tolist(), mine.pieces.number.tolist(), strict=True
            )
        ]
        parts.append(joined(json.dumps(files).encode(), b"".join(digests), mine.encode()))
    return parts


def readers_of_tiles(session: Session) -> list[int]:
    """Return the ranks that read tiles. Not collective.

    All ranks read, unless the options name one a host: on as many ranks as saved, each then
    reads its own file.
    """
    readers = session.options.io.readers
    ranks = choose_ranks("all" if readers == "root" else readers, session.comm.topology)
    return list(ranks)


def joined(*parts: bytes) -> bytes:
    """Join runs of bytes that `split` takes apart. Not collective. Thread-safe."""
    lengths = np.array([len(parts), *map(len, parts)], np.int64)
    return b"".join([lengths.tobytes(), *parts])


def split(data: bytes) -> list[bytes]:
    """Return the runs of bytes that `joined` has joined. Not collective. Thread-safe."""
    count = int(np.frombuffer(data[:8], np.int64)[0])
    first = 8 * (1 + count)
    ends = np.cumsum([first, *np.frombuffer(data[8:first], np.int64)]).tolist()
    return [data[start:end] for start, end in pairwise(ends)]
