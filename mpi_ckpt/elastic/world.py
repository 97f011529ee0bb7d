# SPDX-License-Identifier: Apache-2.0
"""Holds the ranks that a training runs on until one of them is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_ckpt.memory import Memory

__all__ = ["World"]

AnyComm = TypeVar("AnyComm", bound="MPI.Comm")


@dataclass(frozen=True, slots=True)
class World:
    """The argument of a training in `mpi_ckpt.elastic.run`; each recovery makes a new one.

    Attributes:
        comm: Communicator (mpi4py's) of all live ranks. For the training's own calls and
            for its `CheckpointManager`.
        memory: Copies of the states that outlive a recovery; give it to the manager too.
        failures: How often the job has gone on after losing ranks.
        lost: How many ranks it has lost so far.
        is_replacement: Whether this process came in place of a lost rank, as a new rank or
            as a spare.
        spares: How many spare ranks are left.
    """

    comm: MPI.Intracomm
    memory: Memory
    failures: int = 0
    lost: int = 0
    is_replacement: bool = False
    spares: int = 0
    _watched: list[MPI.Comm] = field(default_factory=list, repr=False)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.comm.size

    def watch(self, comm: AnyComm) -> AnyComm:
        """Register a communicator to be revoked when a rank is lost.

        Not collective. Otherwise a survivor that waits in it, for a rank that waits
        elsewhere, waits for ever.

        Args:
            comm: A communicator made from this world's: a duplicate, a split, a library's
                own.

        Returns:
            The same communicator.
        """
        self._watched.append(comm)
        return comm

    @property
    def watched(self) -> list[MPI.Comm]:
        """The communicators given to `watch`. Not collective."""
        return self._watched
