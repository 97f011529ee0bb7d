# SPDX-License-Identifier: Apache-2.0
"""Lets a training go on with another number of ranks: epochs, samples, sums, stops."""

from typing import TYPE_CHECKING

from mpi_ckpt.lazy import lazy_names

if TYPE_CHECKING:
    from mpi_ckpt.elastic.running import World, run
    from mpi_ckpt.memory import Memory

__all__ = ["Memory", "World", "run"]

_MODULES = {
    "Memory": "mpi_ckpt.memory",
    "World": "mpi_ckpt.elastic.running",
    "run": "mpi_ckpt.elastic.running",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
