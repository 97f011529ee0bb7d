# SPDX-License-Identifier: Apache-2.0
"""Steps at which nothing is to be done: beside work, as in a training, and alone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import names
from benchmarks.harness import Contender, Group
from mpi_ckpt import ObjectState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mpi4py import MPI

    from benchmarks.setting import Setting

__all__ = ["groups"]

_COUNT = 1000
_SMOKE_COUNT = 20
_WORDS = 5  # as many as a step sends
_WIDTH = 96  # of matrices, each product a few dozen microseconds
_PRODUCTS = 8
_GRADIENT = 1024


class Work:
    """A training that is as short as one can be: it computes a little, and reduces."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._matrix = np.eye(_WIDTH)
        self._gradient = np.zeros(_GRADIENT)
        self._mean = np.zeros(_GRADIENT)

    def step(self) -> None:
        """Take one step."""
        for _ in range(_PRODUCTS):
            self._matrix = self._matrix @ self._matrix
        self._comm.Allreduce(self._gradient, self._mean)


def _repeat(acts: Sequence[Callable[[], object]], count: int) -> int:
    for _ in range(count):
        for act in acts:
            act()
    return count


def _reducing(comm: MPI.Intracomm) -> Callable[[], object]:
    from mpi4py import MPI

    mine, joined = np.zeros(_WORDS, np.uint64), np.zeros(_WORDS, np.uint64)
    return lambda: comm.Allreduce(mine, joined, op=MPI.BOR)


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    count = _SMOKE_COUNT if setting.arguments.smoke else _COUNT
    manager = setting.manager("ours", [ObjectState("number", 0)], interval="auto")
    work = Work(setting.comm)
    acts: dict[str, dict[str, Sequence[Callable[[], object]]]] = {
        "beside work": {
            names.NO_MANAGER: [work.step],
            names.STEP: [work.step, manager.step],
        },
        "alone": {names.ALLREDUCE: [_reducing(setting.comm)], names.STEP: [manager.step]},
    }
    for group, contenders in acts.items():
        yield Group(
            group,
            8 * _WORDS * count,
            [
                Contender(
                    name,
                    partial(_repeat, repeated, count),
                    values=lambda taken: {"steps": taken},
                    ceiling=name != names.STEP,
                )
                for name, repeated in contenders.items()
            ],
        )
