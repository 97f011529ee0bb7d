# SPDX-License-Identifier: Apache-2.0
"""All of MPI. Nothing else in the package names a communicator of mpi4py.

Everything here is collective unless it says otherwise, and for the main thread only.
"""

from mpi_ckpt.comm.agreement import (
    agree,
    agree_on_root,
    any_of,
    compare_texts,
    differing_digests,
)
from mpi_ckpt.comm.broadcast import bcast_buffers
from mpi_ckpt.comm.communicator import ROOT, Communicator
from mpi_ckpt.comm.leaving import Departure
from mpi_ckpt.comm.liveness import Farewell, abort_job
from mpi_ckpt.comm.repair import Repaired, duplicate, let_go, meet_at_the_end, repair
from mpi_ckpt.comm.scatter import scatter_bytes
from mpi_ckpt.comm.spawning import greet, is_spawned, join
from mpi_ckpt.comm.survival import (
    is_rank_failure,
    is_sign_of_loss,
    why_lost_ranks_end_the_job,
)
from mpi_ckpt.comm.topology import Topology
from mpi_ckpt.comm.transfer import (
    bcast_bytes,
    bcast_json,
    gather_bytes,
    mean_buffers,
)
from mpi_ckpt.comm.vote import Vote

__all__ = [
    "ROOT",
    "Communicator",
    "Departure",
    "Farewell",
    "Repaired",
    "Topology",
    "Vote",
    "abort_job",
    "agree",
    "agree_on_root",
    "any_of",
    "bcast_buffers",
    "bcast_bytes",
    "bcast_json",
    "compare_texts",
    "differing_digests",
    "duplicate",
    "gather_bytes",
    "greet",
    "is_rank_failure",
    "is_sign_of_loss",
    "is_spawned",
    "join",
    "let_go",
    "mean_buffers",
    "meet_at_the_end",
    "repair",
    "scatter_bytes",
    "why_lost_ranks_end_the_job",
]
