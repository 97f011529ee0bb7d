# SPDX-License-Identifier: Apache-2.0
"""Ends the process when a call of MPI, which nothing can interrupt, does not return."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn


def end_as_lost() -> NoReturn:
    """End this process in a way that the other ranks are told of. Not collective.

    Any thread. They survive it, or do not; the restart loop serves.
    """
    # MPI: of a rank that leaves with an exit code, whichever, mpirun tells the others
    # nothing (Open MPI 5.0, ULFM): they wait for it for ever. Of a signal it does.
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class Guard:
    """A context manager: what is in it ends within a time, or the process does.

    Not collective. To the other ranks this one is then lost.

    Args:
        doing: What is done, told when it takes too long.
        seconds: How long it may take.
        code: Exit code then, of a process that the others have no part with any more; None
            ends it as lost.
    """

    def __init__(self, doing: str, seconds: float, code: int | None = None) -> None:
        self._doing = doing
        self._seconds = seconds
        self._code = code
        # No MPI in it: it only looks at the clock.
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
