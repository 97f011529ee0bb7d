# SPDX-License-Identifier: Apache-2.0
"""In one process with Horovod, and in place of what of it does not last.

Importing this imports neither Horovod nor torch, and starts no MPI; each name brings its
own module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi_ckpt.integrations.horovod.attach import communicator
    from mpi_ckpt.integrations.horovod.objects import (
        allgather_object,
        broadcast_object,
    )
    from mpi_ckpt.integrations.horovod.parameters import (
        broadcast_optimizer_state,
        broadcast_parameters,
    )

_PACKAGE = "mpi_ckpt.integrations.horovod"

_MODULES = {
    "allgather_object": f"{_PACKAGE}.objects",
    "broadcast_object": f"{_PACKAGE}.objects",
    "broadcast_optimizer_state": f"{_PACKAGE}.parameters",
    "broadcast_parameters": f"{_PACKAGE}.parameters",
    "communicator": f"{_PACKAGE}.attach",
}

__all__ = [
    "allgather_object",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "communicator",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public name)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
