# SPDX-License-Identifier: Apache-2.0
"""Restricts collective calls to the process and thread that made the communicator."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field

from mpi_ckpt.errors import CollectiveError


@dataclass(slots=True)
class Home:
    """The process and the thread that made a communicator.

    Attributes:
        process, thread: Their numbers.
        hook: The function of the program that this rank runs alone now; empty for none.
    """

    process: int = field(default_factory=os.getpid)
    thread: int = field(default_factory=threading.get_ident)
    hook: str = ""

    def require(self, call: str, rank: int) -> None:
        """Refuse a call from elsewhere, which would wait for ever. Not collective.

        Args:
            call: The public call, for the error.
            rank: Rank of the process.

        Raises:
            CollectiveError: On the calling rank.
        """
        if os.getpid() != self.process:
            raise CollectiveError(
                f"{call}: this process was forked from rank {rank}, and cannot use MPI: "
                "make collective calls in the parent only"
            )
        if self.hook:
            raise CollectiveError(
                f"{call}: called in {self.hook}, which root alone runs: the other ranks "
                "would never arrive; make collective calls after the save or restore"
            )
        if threading.get_ident() != self.thread:
            raise CollectiveError(
                f"{call}: called in another thread than the one that made the manager: "
                "make all collective calls of a rank in that thread"
            )
