# SPDX-License-Identifier: Apache-2.0
"""Brings the files of tiles of all hosts to the hosts that hold them, a piece at a time.

The leader of a host makes its file of what its ranks hand over, keeps it, and sends each
piece to the other holders. A leader has one file in hand at a time, in turns in which no
host has two, so that no leader waits in a circle, and none holds more than a few pieces.
Whatever fails on a host, all messages are sent and received; it raises at the next meeting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import exchange_messages, start_sending
from mpi_ckpt.engine.hosts.handed_tiles import (
    HandedStream,
    hand_to_leader,
    join_runs,
    piece_lengths,
    received_runs,
)
from mpi_ckpt.engine.hosts.placement import order_turns_of_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.hosts.host_tiles import DescribedTiles, OwnFile
    from mpi_ckpt.engine.hosts.level import HostNames
    from mpi_ckpt.engine.hosts.share_plan import SharePlan
    from mpi_ckpt.storage.format.manifest import StoredFile

    Keep = Callable[[StoredFile, Iterator[memoryview]], None]

_DOING = "sending tiles to other hosts"


@dataclass(frozen=True, slots=True)
class _Passed:
    """A file that passes this host: where it comes from, and where it goes."""

    file: StoredFile
    source: int
    others: tuple[int, ...]


class TileCopies:
    """The files of tiles that this rank makes, sends or receives in one save.

    Main thread only.

    Args:
        comm: The communicator.
        hosts: The hosts.
        described: The tiles of this rank, and the file of its host.
        plan: The generation, on leaders; None elsewhere.
    """

    def __init__(
        self,
        comm: Communicator,
        hosts: HostNames,
        described: DescribedTiles,
        plan: SharePlan | None,
    ) -> None:
        self._comm = comm
        self._described = described
        leader = comm.topology.leaders[int(comm.topology.node_of[comm.rank])]
        self._leader = leader
        self._passed: list[_Passed] = []
        self._sends: list[tuple[int, NDArray[np.uint8]]] = []
        if plan is None:
            return
        here = hosts.leaders.index(comm.rank)
        tiles = plan.tiles
        holders = [plan.holders[file.name] for file in tiles.files]
        turns = order_turns_of_files(holders)
        for number in sorted(range(len(turns)), key=turns.__getitem__):
            if here not in holders[number]:
                continue
            source = hosts.leaders[tiles.hosts[number]]
            ranks = [hosts.leaders[host] for host in holders[number]]
            others = tuple(rank for rank in ranks if rank != source)
            self._passed.append(_Passed(tiles.files[number], source, others))

    def pass_on(self, keep: Keep | None) -> None:
        """Move all bytes; raise the first failure on this rank once that is done.

        Not collective: called on every rank.

        Args:
            keep: Keeps a file that is given in runs of bytes, on a leader; None to let the
                bytes pass, after a failure.

        Raises:
            CheckpointError: On the calling rank, if a tile cannot be read, or ``keep``
                fails.
        """
        own, failure = self._described.own, None
        if self._leader != self._comm.rank:
            hand_to_leader(self._comm, self._leader, own)
        for passed in self._passed:
            runs = self._runs_of(passed)
            try:
                if keep is not None and failure is None:
                    keep(passed.file, runs)
            except BaseException as error:
                failure = error
            for _ in runs:
                pass
        if failure is not None:
            raise failure
        if own.failure is not None:
            raise own.failure

    def _runs_of(self, passed: _Passed) -> Iterator[memoryview]:
        file = self._described.file
        if passed.source == self._comm.rank and file is not None:
            yield from self._sent_runs(passed, file)
            return
        for length in piece_lengths(passed.file.nbytes):
            room = np.empty(length, np.uint8)
            exchange_messages(self._comm, [], [(passed.source, room)], _DOING)
            yield room.data

    def _sent_runs(self, passed: _Passed, file: OwnFile) -> Iterator[memoryview]:
        for piece in join_runs(self._made_runs(file), file.nbytes):
            # Kept until the next piece: MPI reads it even if an interrupt ends this.
            self._sends = sends = [(rank, piece) for rank in passed.others]
            requests = start_sending(self._comm, sends)
            yield piece.data  # written while it is on its way
            if requests:
                self._comm.wait(requests, _DOING, streaming=True, buffers=sends)

    def _made_runs(self, file: OwnFile) -> Iterator[memoryview]:
        """Yield the file of this host, of what its ranks hand over meanwhile."""
        yield memoryview(file.header)
        nbytes: dict[int, int] = {}
        for rank, length in file.tiles:
            nbytes[rank] = nbytes.get(rank, 0) + length
        streams = {
            rank: HandedStream(
                self._described.own.runs()
                if rank == self._comm.rank
                else received_runs(self._comm, rank, total)
            )
            for rank, total in nbytes.items()
        }
        for rank, length in file.tiles:
            yield from streams[rank].take(length)
