# SPDX-License-Identifier: Apache-2.0
"""Works in a training of PyTorch Lightning: a callback, a loader, a plugin for checkpoints.

Importing this imports neither Lightning nor torch, and starts no MPI. The first use of a
name imports its module.
"""

from typing import TYPE_CHECKING

from mpi_ckpt.lazy import lazy_names

if TYPE_CHECKING:
    from mpi_ckpt.integrations.lightning.callback import MPICheckpoint
    from mpi_ckpt.integrations.lightning.loader import ElasticLoader
    from mpi_ckpt.integrations.lightning.plugin import MPICheckpointIO

_MODULES = {
    "ElasticLoader": "mpi_ckpt.integrations.lightning.loader",
    "MPICheckpoint": "mpi_ckpt.integrations.lightning.callback",
    "MPICheckpointIO": "mpi_ckpt.integrations.lightning.plugin",
}

__all__ = ["ElasticLoader", "MPICheckpoint", "MPICheckpointIO"]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
