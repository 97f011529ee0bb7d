# SPDX-License-Identifier: Apache-2.0
"""In a training of PyTorch Lightning: a callback, a loader, a plugin for single files.

Importing this imports neither Lightning nor torch, and starts no MPI; each name brings its
own module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public name)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
