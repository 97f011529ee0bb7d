# SPDX-License-Identifier: Apache-2.0
"""Counts the messages that leave a rank, those inside of collectives too.

Open MPI's monitoring component counts them below all of MPI's calls, and gives the counts
as a performance variable of MPI's tool interface, which mpi4py does not have.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SentMessages", "enable"]

_NAME = b"pml_monitoring_messages_count"
_CLASS_SIZE = 2  # MPI_T_PVAR_CLASS_SIZE of Open MPI's mpi.h


def enable() -> None:
    """Make Open MPI count, if MPI was not started yet. Not collective."""
    os.environ["OMPI_MCA_pml_monitoring_enable"] = "1"  # noqa: SIM112


class SentMessages:
    """The messages that this rank has sent to any other. Not collective.

    Attributes:
        is_counted: Whether this MPI counts them.
    """

    def __init__(self) -> None:
        from mpi4py import MPI

        self.is_counted = MPI.Get_library_version().startswith("Open MPI")
        if self.is_counted:
            # The library that mpi4py has loaded, by its name: 40 since Open MPI 3.
            self._mpi: Any = ctypes.CDLL("libmpi.so.40")
            self.is_counted = self._begin(MPI)

    def _begin(self, mpi: Any) -> bool:  # noqa: ANN401 (a module)
        index, ignored = ctypes.c_int(), ctypes.c_int()
        self._session, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        self._size = ctypes.c_int()
        world = ctypes.c_void_p(mpi._handleof(mpi.COMM_WORLD))  # noqa: SLF001
        calls: tuple[Callable[[], Any], ...] = (
            lambda: self._mpi.MPI_T_init_thread(0, ctypes.byref(ignored)),
            lambda: self._mpi.MPI_T_pvar_get_index(_NAME, _CLASS_SIZE, ctypes.byref(index)),
            lambda: self._mpi.MPI_T_pvar_session_create(ctypes.byref(self._session)),
            lambda: self._mpi.MPI_T_pvar_handle_alloc(
                self._session,
                index,
                ctypes.byref(world),
                ctypes.byref(self._handle),
                ctypes.byref(self._size),
            ),
            lambda: self._mpi.MPI_T_pvar_start(self._session, self._handle),
        )
        return all(call() == 0 for call in calls)

    def total(self) -> int:
        """Return how many messages have left this rank so far."""
        counts = (ctypes.c_size_t * self._size.value)()
        failed = self._mpi.MPI_T_pvar_read(self._session, self._handle, counts)
        assert not failed, "Open MPI's monitoring gives no count"
        return sum(counts)
