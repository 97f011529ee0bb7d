# SPDX-License-Identifier: Apache-2.0
"""An error that every rank raises is told in full by one of them; the others name it.

With a thousand ranks the same text would otherwise be printed a thousand times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from mpi_ckpt.errors import CheckpointError, Telling

if TYPE_CHECKING:
    from mpi_ckpt.comm.communicator import Communicator

__all__ = ["told_by"]

Error = TypeVar("Error", bound=CheckpointError)


def told_by(comm: Communicator, error: Error, *tellers: int) -> Error:
    """Return an error that all ranks are about to raise, with who of them tells it.

    Not collective.

    Args:
        comm: The communicator.
        error: The same on every rank.
        tellers: The ranks that print it in full if nobody catches it; none for root.
    """
    by = tellers or (comm.root,)
    brief = f"{type(error).__name__}, as told by rank {by[0]}"
    error.telling = Telling(comm.name, "" if comm.rank in by else brief)
    return error
