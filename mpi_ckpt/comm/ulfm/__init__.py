# SPDX-License-Identifier: Apache-2.0
"""Recovers in place from lost ranks, which only the ULFM of Open MPI 5 makes possible."""

from mpi_ckpt.comm.ulfm.leaving import Departure
from mpi_ckpt.comm.ulfm.repair import Repaired, duplicate, let_go, meet_at_the_end, repair
from mpi_ckpt.comm.ulfm.spawning import greet, is_spawned, join
from mpi_ckpt.comm.ulfm.team import (
    DismissedError,
    await_dismissal,
    count_alike,
    dismiss,
    form_team,
    meet_as_spare,
)

__all__ = [
    "Departure",
    "DismissedError",
    "Repaired",
    "await_dismissal",
    "count_alike",
    "dismiss",
    "duplicate",
    "form_team",
    "greet",
    "is_spawned",
    "join",
    "let_go",
    "meet_as_spare",
    "meet_at_the_end",
    "repair",
]
