# SPDX-License-Identifier: Apache-2.0
"""How a rank leaves for good: together with all others, or by ending the job.

MPI_Finalize waits for every rank. One that leaves alone, by an error of the program, waits
there for the others, who wait for it where they are: for ever.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm.abandoned import keep
from mpi_ckpt.comm.launch import load_mpi

if TYPE_CHECKING:
    from mpi_ckpt.comm.communicator import Communicator

__all__ = ["Farewell", "abort_job"]

_FAREWELL_TAG = 7003
_PAUSE_SECONDS = 1e-3


class Farewell:
    """Tells all ranks that this one leaves, and hears who else does.

    Not collective: a byte to every rank and from every rank that leaves as well, which no
    other wait on the communicator can mistake for its own. Main thread only.

    Args:
        comm: The communicator; it may have missed a deadline.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._heard = {comm.rank}
        self._token = np.zeros(1, np.uint8)
        handle = comm.handle
        others = [rank for rank in range(comm.size) if rank != comm.rank]
        # MPI: to a rank that never looks. So little is on its way at once all the same.
        keep([handle.Isend(self._token, dest=rank, tag=_FAREWELL_TAG) for rank in others])

    def missing(self, seconds: float) -> list[int]:
        """Wait for the farewells of all others, no longer than told.

        Not collective. Main thread only.

        Returns:
            The ranks that do not leave.
        """
        deadline = time.monotonic() + seconds
        while not self._all_heard() and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
        return [rank for rank in range(self._comm.size) if rank not in self._heard]

    def _all_heard(self) -> bool:
        handle, status = self._comm.handle, self._status()
        into = np.zeros(1, np.uint8)
        while handle.Iprobe(tag=_FAREWELL_TAG, status=status):
            handle.Recv(into, source=status.source, tag=_FAREWELL_TAG)
            self._heard.add(status.source)
        return len(self._heard) == self._comm.size

    def _status(self) -> Any:  # noqa: ANN401 (mpi4py is loaded late)
        return load_mpi().Status()


def abort_job(code: int) -> None:
    """End all ranks of the job at once. Not collective. Does not return."""
    load_mpi().COMM_WORLD.Abort(code)
