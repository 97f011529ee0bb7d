# SPDX-License-Identifier: Apache-2.0
"""Ends the process when an MPI call, which nothing can interrupt, does not return."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn


def end_as_lost() -> NoReturn:
    """End this process in a way that MPI reports to the other ranks. Not collective.

    On any thread. If the other ranks do not survive it, the restart loop goes on.
    """
    # MPI: if a rank leaves with any exit code, mpirun tells the other ranks nothing (Open
    # MPI 5.0, ULFM): they wait for it for ever. It does report a death by a signal.
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class Guard:
    """A context manager: its block ends within a time, or the process ends.

    Not collective. The other ranks then see this one as lost.

    Args:
        doing: The work of the block, for the message.
        seconds: How long it may take.
        code: Exit code of a process that is no longer connected to the other ranks; None
            ends it as lost.
    """

    def __init__(self, doing: str, seconds: float, code: int | None = None) -> None:
        self._doing = doing
        self._seconds = seconds
        self._code = code
        # No MPI in it: it only reads the clock.
        self._timer = threading.Timer(seconds, self._end)
        self._timer.name, self._timer.daemon = "mpi_ckpt-guard", True

    def __enter__(self) -> Guard:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()

    def _end(self) -> None:
        sys.stderr.write(
            f"mpi_ckpt: {self._doing} takes more than {self._seconds:g} s: MPI does "
            "not return; this process is ended\n"
        )
        sys.stderr.flush()
        if self._code is None:
            end_as_lost()
        os._exit(self._code)
