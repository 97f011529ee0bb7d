# SPDX-License-Identifier: Apache-2.0
"""How a process leaves a job that has lost ranks: MPI_Finalize waits for the dead.

A rank of the first launch leaves without it, by `os._exit`, once all have met; mpirun takes
that for a good end under ULFM. From a spawned one mpirun wants an MPI_Finalize; that does
not wait for anybody if nothing connects it to others any more.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from mpi_ckpt.comm.communicator import open_communicators
from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import is_done_within
from mpi_ckpt.comm.ulfm.guard import Guard
from mpi_ckpt.comm.ulfm.spawning import is_spawned, made

if TYPE_CHECKING:
    from mpi4py import MPI

logger = logging.getLogger(__name__)

_MEETING_SECONDS = 10.0
_FINALIZE_SECONDS = 10.0


class Departure:
    """What is done at the exit of this process, once ranks were lost. Main thread only.

    Attributes:
        code: Exit code of the program, as far as it is known: that of a `sys.exit` that
            came by, else 1 after an exception that nobody caught, else 0.
    """

    def __init__(self) -> None:
        self.code = 0
        self._handle: MPI.Intracomm | None = None
        self._others: list[MPI.Comm] = []

    @property
    def is_prepared(self) -> bool:
        """Whether ranks were lost."""
        return self._handle is not None

    def leave_by(self, leaving: SystemExit) -> None:
        """Note with which code the program leaves. Not collective."""
        code = leaving.code
        self.code = code if isinstance(code, int) else int(code is not None)

    def prepare(self, handle: MPI.Intracomm, others: list[MPI.Comm]) -> None:
        """Leave so from now on. Not collective. Callable again.

        Args:
            handle: Communicator of all that live.
            others: Communicators of the user, to be freed.
        """
        if self._handle is None:
            # MPI: mpi4py finalizes when all functions of `atexit` are through.
            atexit.register(self._leave)
        self._handle, self._others = handle, others

    def _leave(self) -> None:
        mpi = load_mpi()
        if self._handle is None or mpi.Is_finalized():
            return
        code = self.code or int(hasattr(sys, "last_value"))
        if code == 0:
            # Who is first must not be a lost rank to those who still have words.
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
        try:
            is_done_within(handle.Ibarrier(), _MEETING_SECONDS)
        except mpi.Exception as error:
            logger.info("the others are not met at the end: %s", error)

    def _free_all(self) -> None:
        mpi = load_mpi()
        ours = [handle for one in open_communicators() for handle in one.give_up()]
        for handle in [*self._others, *ours, *reversed(made())]:
            with suppress(mpi.Exception):
                if handle != mpi.COMM_NULL:
                    handle.Free()
