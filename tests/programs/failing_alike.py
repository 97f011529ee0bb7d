# SPDX-License-Identifier: Apache-2.0
"""All ranks fail at once: failing_alike.py FOLDER HOW alike|different

Each leaves by what it has met, which nobody catches.
"""

import sys
import time

import numpy as np
from mpi4py import MPI

from mpi_ckpt import ArrayState, CheckpointManager, Options, State
from mpi_ckpt.engine import abort

folder, how, way = sys.argv[1:]
rank = MPI.COMM_WORLD.rank
own = 0 if way == "alike" else rank
# On a slow machine ranks may be seconds apart in what they do at the same time.
abort._ERROR_SECONDS = 30.0


class Broken(State):
    def save(self, file) -> None:
        raise ValueError(f"no luck {own}")


def unreadable() -> dict[str, np.ndarray]:
    raise ValueError(f"no luck {own}")


def leaves(count: int, length: int) -> dict[str, np.ndarray]:
    return {f"layers.{number}.weight": np.zeros(length) for number in range(count)}


def small(name: str, count: int, end: str = "") -> list[State]:
    return [ArrayState(f"{name}{number}{end}", leaves(1, 3)) for number in range(count)]


def make(*states: State, **options: object) -> CheckpointManager:
    return CheckpointManager(folder, states, options=Options(**options))


def constructor() -> None:
    make(*[ArrayState(f"a{own}", leaves(1, 3))] * 2)


def other_names() -> None:
    make(*small("a", 500, f"-of-{own + rank % 2}"))


def options() -> None:
    make(ArrayState("a", leaves(1, 3)), interval=1 + (rank if own else rank % 2))


def stream() -> None:
    with make(Broken("a")) as manager:
        manager.save()


def capture() -> None:
    with make(ArrayState("a", unreadable)) as manager:
        manager.save()


def mismatch() -> None:
    with make(ArrayState("a", leaves(1000, 3))) as manager:
        manager.save()
    with make(ArrayState("a", leaves(1000, 4 + own))) as manager:
        manager.restore()


def missing() -> None:
    with make(*small("a", 100)) as manager:
        manager.save()
    with make(*small("b", 100)) as manager:
        manager.restore()


def diverged() -> None:
    arrays = leaves(1000, 3)
    for array in arrays.values():
        array[:] = own + rank % 2
    with make(ArrayState("a", arrays, sync="check")) as manager:
        manager.save()


def diverged_states() -> None:
    given = [{"x": np.full(3, float(own + rank % 2))} for _ in range(200)]
    states = [ArrayState(f"a{n}", state, sync="check") for n, state in enumerate(given)]
    with make(*states) as manager:
        manager.save()


def two_wishes() -> None:
    with make(ArrayState("a", leaves(1, 3))) as manager:
        manager.restore(generation=1 + own, step=2)


def name_taken() -> None:
    with make(ArrayState("a", leaves(1, 3))) as manager:
        manager.add(ArrayState("a", leaves(1, 3)))


def other_calls() -> None:
    with make(ArrayState("a", leaves(1, 3))) as manager:
        manager.save()
        calls = [manager.save, manager.restore, manager.step, manager.sync]
        calls[rank if own or way != "alike" else rank % 2]()


def late() -> None:
    MPI.COMM_WORLD.Barrier()
    with make(ArrayState("a", leaves(1, 3)), deadline_seconds=3) as manager:
        if rank == MPI.COMM_WORLD.size - 1:
            time.sleep(8)
        manager.save()


globals()[how]()
