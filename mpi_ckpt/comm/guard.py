# SPDX-License-Identifier: Apache-2.0
"""Ends the process when a call of MPI, which nothing can interrupt, does not return."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["STUCK_CODE", "Guard"]

STUCK_CODE = 70
"""Exit code of a process that was ended here; for a shell, an error of the software."""


class Guard:
    """A context manager: what is in it ends within a time, or the process does.

    Not collective. To the other ranks this one is then dead, which they survive or not;
    the restart loop serves.

    Args:
        doing: What is done, told when it takes too long.
        seconds: How long it may take.
        code: Exit code then.
    """

    def __init__(self, doing: str, seconds: float, code: int = STUCK_CODE) -> None:
        self._doing = doing
        self._seconds = seconds
        self._code = code
        self._over = threading.Event()
        # No MPI in it: it only looks at the clock.
        self._thread = threading.Thread(
            target=self._watch, name="mpi_ckpt-guard", daemon=True
        )

    def __enter__(self) -> Guard:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        if not self._over.wait(self._seconds):
            sys.stderr.write(
                f"mpi_ckpt: {self._doing} takes more than {self._seconds:g} s: MPI does "
                f"not return; this process ends with code {self._code}\n"
            )
            sys.stderr.flush()
            os._exit(self._code)
