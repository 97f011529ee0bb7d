# SPDX-License-Identifier: Apache-2.0
"""Ends one of several trainings in a job without ending the others early.

MPI: MPI_Abort on any communicator ends the whole job, as does a process that exits before
MPI_Finalize (Open MPI 5.0, MPICH 5.0); and MPI_Finalize waits for all ranks. So a failed
rank waits until the ranks of the other members are done, and then ends the job. Those ranks
answer when the failed rank asks them. Ranks use the world communicator only after a
failure, or when a rank no longer waits to be asked.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import Patience, Tag, call_off, keep_forever
from mpi_ckpt.failures import rank_ranges

if TYPE_CHECKING:
    from mpi_ckpt.comm.communicator import Communicator
    from mpi_ckpt.options import AbortOn


def member_of(comm: Communicator, how: AbortOn) -> Member | None:
    """Return the ensemble member of a communicator; None if it is not one.

    Not collective.

    Args:
        comm: The communicator.
        how: Value of `Options.abort_on_error`.
    """
    member = Member(comm) if how == "communicator" else None
    return member if member is not None and member.others else None


class Member:
    """One member of an ensemble: the ranks of a communicator. Main thread only.

    Not collective.

    Args:
        comm: The member's communicator.
    """

    def __init__(self, comm: Communicator) -> None:
        self._mpi: Any = load_mpi()
        self._comm = comm
        world = self._mpi.COMM_WORLD
        self._me, self._size = world.rank, world.size
        ours, everybody = comm.handle.Get_group(), world.Get_group()
        self._ranks = ours.Translate_ranks(None, everybody)
        ours.Free()
        everybody.Free()

    @property
    def name(self) -> str:
        """The name of this member in messages."""
        ranks = "ranks" if len(self._ranks) > 1 else "rank"
        return f"the member of {ranks} {rank_ranges(sorted(self._ranks))} of {self._size}"

    @property
    def others(self) -> set[int]:
        """The ranks of the job outside of this member."""
        return set(range(self._size)).difference(self._ranks)

    def outlive(self) -> None:
        """Wait until all other members are done, or have failed too."""
        with suppress(self._mpi.Exception):  # a member may have lost ranks
            if self._comm.is_open:
                call_off(self._comm.handle)
        self._send(Tag.FAILED, np.array(self._ranks, np.int64))
        waited_for, patience = self.others, Patience(None)
        while waited_for:
            while (heard := self._hear(Tag.FAILED)) is not None:
                waited_for.difference_update(heard[1].tolist())
            while (heard := self._hear(Tag.DONE)) is not None:
                waited_for.discard(heard[0])
            patience.go_round()

    def leave(self) -> None:
        """Tell failed ranks that this rank is done, as long as this is useful.

        Called at the end of the program. It waits for all ranks of the job, but no longer
        than the deadline; after that it tells all ranks that it is done, and only
        MPI_Finalize waits.
        """
        request = self._mpi.COMM_WORLD.Ibarrier()
        patience, nothing = Patience(self._comm.deadline_seconds), np.zeros(0, np.int64)
        while not request.Test():
            while (heard := self._hear(Tag.FAILED)) is not None:
                keep_forever(
                    self._mpi.COMM_WORLD.Isend(nothing, heard[0], Tag.DONE), nothing
                )
            patience.go_round()
            if patience.is_over:
                keep_forever(request)
                self._send(Tag.DONE, nothing)
                return

    def _send(self, tag: Tag, words: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        world = self._mpi.COMM_WORLD
        keep_forever(words, [world.Isend(words, rank, tag) for rank in sorted(self.others)])

    def _hear(self, tag: Tag) -> tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None:
        """Receive a message with a tag; return sender and message, or None."""
        mpi, status = self._mpi, self._mpi.Status()
        if not mpi.COMM_WORLD.Iprobe(mpi.ANY_SOURCE, tag, status):
            return None
        words = np.zeros(status.Get_count(mpi.INT64_T), np.int64)
        mpi.COMM_WORLD.Recv(words, status.source, tag)
        return status.source, words
