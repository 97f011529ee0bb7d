# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for MPI jobs: a job killed at any moment goes on from the last saved step.

Importing this package starts no MPI, imports no torch, installs no signal handler and
configures no logging. The first use of a name imports its module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi_ckpt.elastic.accumulator import Accumulator
    from mpi_ckpt.elastic.epochs import EpochState, remaining_epochs_until
    from mpi_ckpt.elastic.preemption import PreemptionGuard
    from mpi_ckpt.elastic.sampler import ElasticCollate, ElasticSampler
    from mpi_ckpt.engine.hosts.local_settings import Local
    from mpi_ckpt.engine.save.pending import PendingSave
    from mpi_ckpt.errors import CheckpointError
    from mpi_ckpt.hooks import Hooks
    from mpi_ckpt.loading import load
    from mpi_ckpt.manager import CheckpointManager
    from mpi_ckpt.options import IO, Options, StopWhen
    from mpi_ckpt.pacing import AutoInterval
    from mpi_ckpt.reports import GenerationInfo, RestoreReport, SaveReport, SyncReport
    from mpi_ckpt.retention import KeepBest, KeepEvery, KeepLast
    from mpi_ckpt.state import State
    from mpi_ckpt.states.arrays import ArrayState
    from mpi_ckpt.states.distributed.blocks import Block
    from mpi_ckpt.states.distributed.concat import ConcatState
    from mpi_ckpt.states.distributed.sharded import ShardedArrayState
    from mpi_ckpt.states.module import ModuleState
    from mpi_ckpt.states.nested import ObjectState, SchedulerState
    from mpi_ckpt.states.optimizer import OptimizerState
    from mpi_ckpt.states.train import TrainState
    from mpi_ckpt.states.unshared.ranked import PerRankState
    from mpi_ckpt.states.unshared.rng import RNGState

__version__ = "0.1.0"

_MODULES = {
    "Accumulator": "mpi_ckpt.elastic.accumulator",
    "ArrayState": "mpi_ckpt.states.arrays",
    "AutoInterval": "mpi_ckpt.pacing",
    "Block": "mpi_ckpt.states.distributed.blocks",
    "CheckpointError": "mpi_ckpt.errors",
    "CheckpointManager": "mpi_ckpt.manager",
    "ConcatState": "mpi_ckpt.states.distributed.concat",
    "ElasticCollate": "mpi_ckpt.elastic.sampler",
    "ElasticSampler": "mpi_ckpt.elastic.sampler",
    "EpochState": "mpi_ckpt.elastic.epochs",
    "GenerationInfo": "mpi_ckpt.reports",
    "Hooks": "mpi_ckpt.hooks",
    "IO": "mpi_ckpt.options",
    "KeepBest": "mpi_ckpt.retention",
    "KeepEvery": "mpi_ckpt.retention",
    "KeepLast": "mpi_ckpt.retention",
    "Local": "mpi_ckpt.engine.hosts.local_settings",
    "ModuleState": "mpi_ckpt.states.module",
    "ObjectState": "mpi_ckpt.states.nested",
    "OptimizerState": "mpi_ckpt.states.optimizer",
    "Options": "mpi_ckpt.options",
    "PendingSave": "mpi_ckpt.engine.save.pending",
    "PerRankState": "mpi_ckpt.states.unshared.ranked",
    "PreemptionGuard": "mpi_ckpt.elastic.preemption",
    "RNGState": "mpi_ckpt.states.unshared.rng",
    "RestoreReport": "mpi_ckpt.reports",
    "SaveReport": "mpi_ckpt.reports",
    "SchedulerState": "mpi_ckpt.states.nested",
    "ShardedArrayState": "mpi_ckpt.states.distributed.sharded",
    "State": "mpi_ckpt.state",
    "StopWhen": "mpi_ckpt.options",
    "SyncReport": "mpi_ckpt.reports",
    "TrainState": "mpi_ckpt.states.train",
    "load": "mpi_ckpt.loading",
    "remaining_epochs_until": "mpi_ckpt.elastic.epochs",
}

__all__ = [
    "IO",
    "Accumulator",
    "ArrayState",
    "AutoInterval",
    "Block",
    "CheckpointError",
    "CheckpointManager",
    "ConcatState",
    "ElasticCollate",
    "ElasticSampler",
    "EpochState",
    "GenerationInfo",
    "Hooks",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "Local",
    "ModuleState",
    "ObjectState",
    "OptimizerState",
    "Options",
    "PendingSave",
    "PerRankState",
    "PreemptionGuard",
    "RNGState",
    "RestoreReport",
    "SaveReport",
    "SchedulerState",
    "ShardedArrayState",
    "State",
    "StopWhen",
    "SyncReport",
    "TrainState",
    "load",
    "remaining_epochs_until",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public name)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
