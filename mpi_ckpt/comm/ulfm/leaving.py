# SPDX-License-Identifier: Apache-2.0
"""Lets a process leave a job that has lost ranks: MPI_Finalize would wait for them.

A rank of the first launch leaves without MPI_Finalize, by `os._exit`, after all have met;
under ULFM mpirun accepts this as a normal end. A spawned rank must call MPI_Finalize, which
waits for no rank if no communicator connects it to others any more.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm.communicator import open_communicators
from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import is_done_within
from mpi_ckpt.comm.survival import has_lost_ranks
from mpi_ckpt.comm.ulfm.guard import Guard
from mpi_ckpt.comm.ulfm.spawning import is_spawned, made

if TYPE_CHECKING:
    from mpi4py import MPI

logger = logging.getLogger(__name__)

_MEETING_SECONDS = 10.0
_FINALIZE_SECONDS = 10.0


class Departure:
    """The exit of this process after ranks were lost. Main thread only.

    Attributes:
        code: Exit code of the program, as far as known: that of a noted `sys.exit`, else 1
            after an uncaught exception, else 0.
    """

    def __init__(self) -> None:
        self.code = 0
        self._handle: MPI.Intracomm | None = None
        self._others: list[MPI.Comm] = []

    @property
    def is_prepared(self) -> bool:
        """Whether ranks were lost, or spares were left alone by a failed training."""
        return self._handle is not None

    def leave_by(self, leaving: SystemExit) -> None:
        """Note the exit code of the program. Not collective."""
        code = leaving.code
        self.code = code if isinstance(code, int) else int(code is not None)

    def prepare(self, handle: MPI.Intracomm, others: list[MPI.Comm]) -> None:
        """Arrange to leave this way. Not collective. Callable again.

        Args:
            handle: Communicator of all live ranks.
            others: Communicators of the user, to be freed.
        """
        if self._handle is None:
            # MPI: mpi4py finalizes after all functions of `atexit`.
            atexit.register(self._leave)
        self._handle, self._others = handle, others

    def prepare_if_lost(self, handle: MPI.Intracomm) -> None:
        """Arrange it if spares were lost, after all ranks have agreed on the end.

        Not collective.

        Args:
            handle: Communicator of all ranks.
        """
        # MPI: in about every tenth job MPI_Finalize waits for a lost spare.
        if has_lost_ranks(handle):
            self.prepare(handle, [])

    def _leave(self) -> None:
        mpi = load_mpi()
        if self._handle is None or mpi.Is_finalized():
            return
        code = self.code or int(hasattr(sys, "last_value"))
        if code == 0:
            # The first rank to leave must not look lost to ranks that still communicate.
            self._meet()
        if is_spawned():
            with Guard("MPI_Finalize", _FINALIZE_SECONDS, code):
                self._free_all()
                mpi.Finalize()
            return
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)

    def _meet(self) -> None:
        mpi = load_mpi()
        handle = self._handle
        assert handle is not None
        flag = np.ones(1, np.int32)
        try:
            # A barrier would raise for a lost spare, on this rank or on that.
            is_done_within(handle.Iagree(flag), _MEETING_SECONDS)
        except mpi.Exception as error:
            logger.info("the other ranks were not met at the end: %s", error)

    def _free_all(self) -> None:
        mpi = load_mpi()
        ours = [
            handle
            for communicator in open_communicators()
            for handle in communicator.give_up()
        ]
        for handle in [*self._others, *ours, *reversed(made())]:
            with suppress(mpi.Exception):
                if handle != mpi.COMM_NULL:
                    handle.Free()
