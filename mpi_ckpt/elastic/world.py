# SPDX-License-Identifier: Apache-2.0
"""The ranks that a training runs on until one of them is lost."""

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
    """What `mpi_ckpt.elastic.run` gives the training; each recovery makes a new one.

    Attributes:
        comm: Communicator of all ranks that live, of mpi4py. For the training's own calls
            and for its `CheckpointManager`.
        memory: Copies of the states that outlive a recovery; for its manager too.
        failures: How often the job has gone on after losing ranks.
        lost: How many ranks it has lost so far.
        is_replacement: Whether this process was started in place of a lost rank.
    """

    comm: MPI.Intracomm
    memory: Memory
    failures: int = 0
    lost: int = 0
    is_replacement: bool = False
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
        """Have a communicator revoked, too, when a rank is lost.

        Not collective. Without it a survivor that waits there, for one that waits
        elsewhere, waits for ever.

        Args:
            comm: Made from this world's: a duplicate, a split, a library's own.

        Returns:
            The same.
        """
        self._watched.append(comm)
        return comm

    @property
    def watched(self) -> list[MPI.Comm]:
        """What `watch` was told of. Not collective."""
        return self._watched
