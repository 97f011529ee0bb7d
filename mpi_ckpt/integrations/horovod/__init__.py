# SPDX-License-Identifier: Apache-2.0
"""Works in one process with Horovod, and replaces its parts that are not durable.

Importing this imports neither Horovod nor torch, and starts no MPI. The first use of a name
imports its module.
"""

from typing import TYPE_CHECKING

from mpi_ckpt.lazy import lazy_names

if TYPE_CHECKING:
    from mpi_ckpt.integrations.horovod.attach import communicator
    from mpi_ckpt.integrations.horovod.elastic_run import run
    from mpi_ckpt.integrations.horovod.elastic_sampler import (
        HorovodSampler as ElasticSampler,
    )
    from mpi_ckpt.integrations.horovod.elastic_state import HorovodState as ObjectState
    from mpi_ckpt.integrations.horovod.elastic_state import TorchState
    from mpi_ckpt.integrations.horovod.interrupts import (
        HostsUpdatedInterrupt,
        RollBackError,
    )
    from mpi_ckpt.integrations.horovod.object_exchange import (
        allgather_object,
        broadcast_object,
    )
    from mpi_ckpt.integrations.horovod.parameters import (
        broadcast_optimizer_state,
        broadcast_parameters,
    )
    from mpi_ckpt.integrations.horovod.settings import configure

_PACKAGE = "mpi_ckpt.integrations.horovod"

# The names are Horovod's, except where this package uses the name for something else.
_MODULES = {
    "ElasticSampler": f"{_PACKAGE}.elastic_sampler:HorovodSampler",
    "HostsUpdatedInterrupt": f"{_PACKAGE}.interrupts",
    "ObjectState": f"{_PACKAGE}.elastic_state:HorovodState",
    "RollBackError": f"{_PACKAGE}.interrupts",
    "TorchState": f"{_PACKAGE}.elastic_state",
    "allgather_object": f"{_PACKAGE}.object_exchange",
    "broadcast_object": f"{_PACKAGE}.object_exchange",
    "broadcast_optimizer_state": f"{_PACKAGE}.parameters",
    "broadcast_parameters": f"{_PACKAGE}.parameters",
    "communicator": f"{_PACKAGE}.attach",
    "configure": f"{_PACKAGE}.settings",
    "run": f"{_PACKAGE}.elastic_run",
}

__all__ = [
    "ElasticSampler",
    "HostsUpdatedInterrupt",
    "ObjectState",
    "RollBackError",
    "TorchState",
    "allgather_object",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "communicator",
    "configure",
    "run",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
