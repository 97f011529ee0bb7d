# SPDX-License-Identifier: Apache-2.0
"""What lets a training go on with another number of ranks: epochs, samples, sums, stops."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpi_ckpt.memory import Memory

if TYPE_CHECKING:
    from mpi_ckpt.elastic.running import run
    from mpi_ckpt.elastic.world import World

__all__ = ["Memory", "World", "run"]

_MODULES = {
    "World": "mpi_ckpt.elastic.world",
    "run": "mpi_ckpt.elastic.running",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public name)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
