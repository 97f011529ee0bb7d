# SPDX-License-Identifier: Apache-2.0
"""Holds all use of MPI: no other module of the package uses a communicator of mpi4py.

Every function here is collective unless its docstring says otherwise, and for the main
thread only.
"""

from mpi_ckpt.comm.agreement import (
    UNTOUCHED,
    Deferred,
    Meeting,
    Vote,
    agree,
    any_of,
    collect,
    compare_texts,
    differing_digests,
    meet,
    on_root,
    printed_by,
)
from mpi_ckpt.comm.broadcast import bcast_buffers, bcast_on_hosts, bcast_to_hosts
from mpi_ckpt.comm.collectives import (
    bcast_bytes,
    bcast_json,
    exchange_counts,
    exchange_messages,
    mean_buffers,
    start_sending,
)
from mpi_ckpt.comm.communicator import Communicator
from mpi_ckpt.comm.dealing_out import deal_out
from mpi_ckpt.comm.liveness import Farewell, abort_job, is_mpi_running
from mpi_ckpt.comm.members import Member, member_of
from mpi_ckpt.comm.rank_tree import gather_bytes, scatter_bytes
from mpi_ckpt.comm.survival import (
    is_rank_failure,
    is_sign_of_loss,
    why_lost_ranks_end_the_job,
)
from mpi_ckpt.comm.topology import Topology, choose_ranks

__all__ = [
    "UNTOUCHED",
    "Communicator",
    "Deferred",
    "Farewell",
    "Meeting",
    "Member",
    "Topology",
    "Vote",
    "abort_job",
    "agree",
    "any_of",
    "bcast_buffers",
    "bcast_bytes",
    "bcast_json",
    "bcast_on_hosts",
    "bcast_to_hosts",
    "choose_ranks",
    "collect",
    "compare_texts",
    "deal_out",
    "differing_digests",
    "exchange_counts",
    "exchange_messages",
    "gather_bytes",
    "is_mpi_running",
    "is_rank_failure",
    "is_sign_of_loss",
    "mean_buffers",
    "meet",
    "member_of",
    "on_root",
    "printed_by",
    "scatter_bytes",
    "start_sending",
    "why_lost_ranks_end_the_job",
]
