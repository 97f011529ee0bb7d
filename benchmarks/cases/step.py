# SPDX-License-Identifier: Apache-2.0
"""Steps at which nothing is to be done, one after the other, against a bare allreduce."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import names
from benchmarks.harness import Contender, Group
from mpi_ckpt import ObjectState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpi4py import MPI

    from benchmarks.setting import Setting
    from mpi_ckpt import CheckpointManager

__all__ = ["groups"]

_COUNT = 2000
_SMOKE_COUNT = 20
_WORDS = 5  # as many as a step sends


def _take_steps(manager: CheckpointManager, count: int) -> int:
    for _ in range(count):
        manager.step()
    return count


def _reduce(comm: MPI.Intracomm, count: int) -> int:
    from mpi4py import MPI

    mine, joined = np.zeros(_WORDS, np.uint64), np.zeros(_WORDS, np.uint64)
    for _ in range(count):
        comm.Allreduce(mine, joined, op=MPI.BOR)
    return count


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    count = _SMOKE_COUNT if setting.arguments.smoke else _COUNT
    manager = setting.manager("ours", [ObjectState("number", 0)], interval="auto")
    acts = {
        names.ALLREDUCE: partial(_reduce, setting.comm, count),
        names.STEP: partial(_take_steps, manager, count),
    }
    contenders = [
        Contender(
            name,
            act,
            values=lambda taken: {"steps": taken},
            ceiling=name == names.ALLREDUCE,
        )
        for name, act in acts.items()
    ]
    yield Group(f"{count} steps", 8 * _WORDS * count, contenders)
