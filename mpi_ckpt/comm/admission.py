# SPDX-License-Identifier: Apache-2.0
"""Whether a job may begin at all: what each rank can tell alone, and what all must tell.

Before the ranks have a communicator, only what every rank sees the same way can be refused.
What one may see otherwise is refused once they can speak, and on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm.horovod import check_finalized, check_horovod, is_horovods
from mpi_ckpt.comm.launch import check_launch
from mpi_ckpt.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

__all__ = ["Objection", "check_before"]


def check_before(mpi: Any, comm: MPI.Intracomm | None) -> None:  # noqa: ANN401 (a module)
    """Refuse what every rank sees the same way.

    Not collective.

    Args:
        mpi: ``mpi4py.MPI``.
        comm: The user's communicator; None is the world.

    Raises:
        LaunchError: On every rank.
    """
    check_finalized(mpi)
    # Whoever passes COMM_SELF means a job of one rank.
    if comm is None or comm != mpi.COMM_SELF:
        name, version = mpi.get_vendor()
        # A rank that was spawned is a world of its own, and has its peers in `comm`.
        size = max(mpi.COMM_WORLD.size, 1 if comm is None else comm.size)
        check_launch(size, f"{name} {'.'.join(map(str, version))}")


@dataclass(frozen=True, slots=True)
class Objection:
    """What this rank has against the job.

    Attributes:
        text: The reason; empty for none.
    """

    text: str = ""

    @classmethod
    def of(cls, mpi: Any, parent: MPI.Intracomm) -> Objection:  # noqa: ANN401 (a module)
        """Look for one. Not collective.

        Args:
            mpi: ``mpi4py.MPI``.
            parent: The communicator to be duplicated.
        """
        try:
            check_horovod(mpi, parent.size, is_part=is_horovods(parent))
        except LaunchError as error:
            return cls(str(error))
        return cls()

    @property
    def is_raised(self) -> bool:
        """Whether there is one."""
        return self.text != ""

    def settle(self, handle: MPI.Intracomm, raised: Sequence[bool]) -> None:
        """Raise on every rank if any has an objection.

        Collective. Main thread only.

        Args:
            handle: Communicator on which all ranks have just met.
            raised: Which of them have one, the same on every rank.

        Raises:
            LaunchError: On every rank, naming those that object.
        """
        if not any(raised):
            return
        reasons: dict[str, list[int]] = {}
        for rank, text in enumerate(handle.allgather(self.text)):
            if text:
                reasons.setdefault(text, []).append(rank)
        lines = [
            text if len(ranks) == len(raised) else f"rank {_join(ranks)}: {text}"
            for text, ranks in reasons.items()
        ]
        raise LaunchError("\n  ".join(lines), problems=lines)


def _join(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
