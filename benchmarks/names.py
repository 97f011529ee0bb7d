# SPDX-License-Identifier: Apache-2.0
"""Names of contenders that the targets speak of: written in one place, found by both."""

from __future__ import annotations

RAW_WRITE = "raw direct write"
RAW_BUFFERED_WRITE = "raw buffered write + fsync"
RAW_READ = "raw direct read"
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
SAVE_ASYNC = "mpi_ckpt save, asynchronous"
STALL = "mpi_ckpt save, asynchronous, sync=False"
STALL_SYNC = "mpi_ckpt save, asynchronous, sync=True"
STALL_OVERLAP = "mpi_ckpt save, overlapped, sync=False"
SYNC = "mpi_ckpt sync"
RESTORE = "mpi_ckpt restore"
REUSE_FULL = "mpi_ckpt save, all bytes changed"
REUSE_PART = "mpi_ckpt save, 1% of the bytes changed"
MANY_LEAVES = "many leaves of 4 KB"
STEP = "mpi_ckpt step"
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
PKL5 = "mpi4py.util.pkl5 bcast"
HOROVOD = "Horovod"
HOROVOD_SYNC = "Horovod broadcast_parameters"
HOROVOD_TRAINING = "Horovod broadcast_parameters + broadcast_optimizer_state"
HOROVOD_COMMIT = "Horovod TorchState.commit, in memory"
HOROVOD_OBJECT = "Horovod broadcast_object"


def beside_horovod(name: str) -> str:
    """Return the name of one of ours that runs while Horovod's thread polls."""
    return f"{name}, beside Horovod"


def durable(name: str) -> str:
    """Return the name of a peer that is brought to the durability of a save of ours."""
    return f"{name} + fsync"
