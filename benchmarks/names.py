# SPDX-License-Identifier: Apache-2.0
"""Names of contenders that the targets speak of: written in one place, found by both."""

from __future__ import annotations

RAW_WRITE = "raw direct write"
RAW_BUFFERED_WRITE = "raw buffered write + fsync"
RAW_READ = "raw direct read"
RAW_OWN_WRITE = "raw direct write by all"
RAW_OWN_READ = "raw direct read by all"
RAW_BUFFERED_READ = "raw buffered read"
MEMCPY = "memcpy into warm memory"
BCAST = "Bcast of all leaves"
IBCAST = "Ibcast of all leaves + Waitall"
DIGEST = "digest of all leaves, every rank"
ONE_HOP = "Send to the next host"
NO_SAVES = "no saves"
NO_MANAGER = "no manager"
ALLREDUCE = "Allreduce of 40 bytes"
ONE_LEAF = "one leaf of the same bytes"
ONE_COPY = "one copy in fresh memory"

SAVE = "mpi_ckpt save"
SAVE_UNSEEN = "mpi_ckpt save, reported to nobody"
SAVE_SEEN = "mpi_ckpt save, with all hooks and a timeline"
REPORTING = "mpi_ckpt reporting of a save, with all hooks and a timeline"
SAVE_ASYNC = "mpi_ckpt save, asynchronous"
COPIES = "mpi_ckpt Memory(every=1)"
COPIES_ON_ROOT = 'mpi_ckpt Memory("root", every=1)'
STALL = "mpi_ckpt save, asynchronous, sync=False"
STALL_SYNC = "mpi_ckpt save, asynchronous, sync=True"
STALL_LOCAL = "mpi_ckpt save to the hosts, asynchronous"
SAVE_LOCAL = "mpi_ckpt save to the hosts"
RESTORE_LOCAL = "mpi_ckpt restore after a lost host"
RAW_LOCAL_COPY = "digest of all leaves, and copy of each host's share, at once"
RAW_LOCAL_WRITE = "plain copies to files, each host its share"
STEPS_COPIED = "mpi_ckpt copy from the hosts behind the steps"
STALL_OVERLAP = "mpi_ckpt save, overlapped, sync=False"
SYNC = "mpi_ckpt sync"
RESTORE = "mpi_ckpt restore"
REUSE_FULL = "mpi_ckpt save, all bytes changed"
REUSE_PART = "mpi_ckpt save, 1% of the bytes changed"
MANY_LEAVES = "many leaves of 4 KB"
STEP = "mpi_ckpt step"
SAVE_CUT = "mpi_ckpt save of cut arrays"
RESTORE_SAME = "mpi_ckpt restore, same boxes"
RESTORE_OTHER = "mpi_ckpt restore, rows into columns"
RESTORE_FEWER = "mpi_ckpt restore, rows into columns, half the ranks"
RESTORE_ONE_READER = "mpi_ckpt restore, rows into columns, one reader a host"
PLAN_RESTORE = "mpi_ckpt plan of a restore"
PLAN_SAVE = "mpi_ckpt join of the boxes of a save"
TABLES = "mpi_ckpt columns of all boxes"
SORT_BOXES = "one sort of all boxes"
PLAN_LARGE = "1,000 leaves in 3-D from 64 to 48 ranks"
PLAN_SMALL = "100,000 boxes of 20,000 small leaves"
BROADCAST_TRAINING = "mpi_ckpt broadcast_parameters + broadcast_optimizer_state"
COMMIT_DURABLE = "mpi_ckpt TorchState.commit, on disk"
COMMIT_ASYNC = "mpi_ckpt TorchState.commit, to disk behind the training"
COMMIT_MEMORY = "mpi_ckpt TorchState.commit, in memory"
BROADCAST_OBJECT = "mpi_ckpt broadcast_object"
BROADCAST_OBJECT_IN_PLACE = "mpi_ckpt broadcast_object, in place"

TORCH = "torch.save"
TORCH_LOAD = "torch.load on every rank"
SAFETENSORS = "safetensors"
DCP = "torch DCP"
TORCHSNAPSHOT = "torchsnapshot"
ADAPTDL = "adaptdl"
GATHER = "gather to root, one file + fsync"
MPI_IO = "MPI-IO Write_all + Sync"
TENSORSTORE = "TensorStore"
PKL5 = "mpi4py.util.pkl5 bcast"
HOROVOD = "Horovod"
HOROVOD_SYNC = "Horovod broadcast_parameters"
HOROVOD_TRAINING = "Horovod broadcast_parameters + broadcast_optimizer_state"
HOROVOD_COMMIT = "Horovod TorchState.commit, in memory"
HOROVOD_OBJECT = "Horovod broadcast_object"


RAW_SHAPES = ((8, 1), (4, 4), (16, 4), (1, 16), (16, 8))
"""Of raw direct transfers: MiB of a block, blocks in flight. A run finds the fastest."""


def raw_with(name: str, mebibytes: int, depth: int) -> str:
    """Return the name of a raw transfer with one of `RAW_SHAPES`."""
    return f"{name}, {depth} x {mebibytes} MiB"


def load(name: str) -> str:
    """Return the name of a peer's restore."""
    return f"{name} load"


def beside_horovod(name: str) -> str:
    """Return the name of one of ours that runs while Horovod's thread polls."""
    return f"{name}, beside Horovod"


def durable(name: str) -> str:
    """Return the name of a peer that is brought to the durability of a save of ours."""
    return f"{name} + fsync"
