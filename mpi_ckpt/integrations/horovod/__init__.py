# SPDX-License-Identifier: Apache-2.0
"""In one process with Horovod, and in place of what of it does not last.

Importing this imports neither Horovod nor torch, and starts no MPI; each name brings its
own module when it is first used.
"""

from importlib import import_module
from typing import Any

_HERE = "mpi_ckpt.integrations.horovod"

_MODULES: dict[str, str] = {
    "ElasticSampler": f"{_HERE}.sampler",
    "HostsUpdatedInterrupt": f"{_HERE}.interrupts",
    "ObjectState": f"{_HERE}.elastic_state",
    "RollBackError": f"{_HERE}.interrupts",
    "TorchState": f"{_HERE}.elastic_state",
    "configure": f"{_HERE}.settings",
    "run": f"{_HERE}.run",
}

__all__: list[str] = sorted(_MODULES)


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public name)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
