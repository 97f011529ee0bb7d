# SPDX-License-Identifier: Apache-2.0
"""Replicas made equal: when they are, when every leaf differs, and over sizes."""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import ceilings, names
from benchmarks.harness import Contender, Group
from benchmarks.peers import find_horovod, sync_contenders
from benchmarks.setting import touch_arrays
from mpi_ckpt import ArrayState, Options
from mpi_ckpt.leaves.digest import digest_many

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpi4py import MPI

    from benchmarks.setting import Setting
    from mpi_ckpt import SyncReport

__all__ = ["groups", "one_hop", "sweep_sizes"]

_SMALLEST_BYTES = 1 << 10
_SWEEP_FACTOR = 16
_SMOKE_BYTES = 64 << 10


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    comm, arrays = setting.comm, list(setting.state.values())
    manager = setting.manager("ours")
    raw = [
        Contender(names.BCAST, lambda: ceilings.bcast(comm, arrays), ceiling=True),
        Contender(names.IBCAST, lambda: ceilings.ibcast(comm, arrays), ceiling=True),
        *one_hop(setting),
        Contender(names.DIGEST, lambda: _digest(arrays)),
    ]

    def ours(before: Callable[[], None]) -> Contender:
        return Contender(names.SYNC, manager.sync, before, values=_sent)

    for name, before in (("equal", setting.touch), ("all differ", setting.differ)):
        contenders = [*raw, ours(before), *sync_contenders(setting, before)]
        yield Group(name, setting.nbytes, contenders)
        setting.touch()  # equal again
    if setting.arguments.sweep or setting.arguments.smoke:
        yield from _sweep(setting)


def sweep_sizes(largest: int) -> list[int]:
    """Return the sizes of the sweep in bytes, the largest included."""
    sizes = [_SMALLEST_BYTES]
    while sizes[-1] * _SWEEP_FACTOR < largest:
        sizes.append(sizes[-1] * _SWEEP_FACTOR)
    return [*sizes, largest] if largest > sizes[-1] else sizes


def _sent(report: SyncReport) -> dict[str, float]:
    return {"bytes_sent": report.bytes_sent, "bytes_hashed": report.bytes_hashed}


def _digest(arrays: list[np.ndarray]) -> None:
    sizes = np.array([array.nbytes for array in arrays])
    digest_many(lambda i, j: arrays[i:j], sizes, Options().io.digest_threads)


def one_hop(setting: Setting) -> list[Contender]:
    """Across hosts: root sends once to the first rank of another, at line rate."""
    comm, arrays = setting.comm, list(setting.state.values())
    hosts = comm.allgather(socket.gethostname())
    there = next((rank for rank, host in enumerate(hosts) if host != hosts[0]), None)
    if there is None:
        return []

    def hop() -> None:
        for array in arrays:
            if comm.rank == 0:
                comm.Send(array, dest=there)
            elif comm.rank == there:
                comm.Recv(array, source=0)
        comm.Barrier()

    return [Contender(names.ONE_HOP, hop)]


def _sweep(setting: Setting) -> Iterator[Group]:
    arguments = setting.arguments
    sizes = sweep_sizes(_SMOKE_BYTES if arguments.smoke else arguments.largest)
    comm, horovod = setting.comm, find_horovod(setting)
    # One memory for all: every page is touched here, not by the first contender.
    memory = np.ones(sizes[-1] // 4, np.float32)
    for operation in ("bcast", "allreduce"):
        for size in sizes:
            array = memory[: size // 4]
            before = partial(_differ, array, comm.rank)
            mode: Any = "root" if operation == "bcast" else "mean"
            manager = setting.manager(
                f"{operation}-{size}", [ArrayState("sweep", {"all": array}, sync=mode)]
            )
            contenders = _raw_sweep(comm, operation, array)
            contenders.append(Contender(names.SYNC, manager.sync, before, values=_sent))
            if horovod is not None:
                import torch

                act = horovod.broadcast if operation == "bcast" else horovod.allreduce
                make: Any = torch.from_numpy
                contenders.append(
                    Contender(
                        f"Horovod {operation}",
                        partial(act, make(array)),
                        horovod.begin,
                        lambda _: horovod.end(),
                    )
                )
            yield Group(f"{operation} {size} bytes", array.nbytes, contenders)


def _differ(array: np.ndarray, rank: int) -> None:
    touch_arrays([array], rank + 1)


def _raw_sweep(comm: MPI.Intracomm, operation: str, array: np.ndarray) -> list[Contender]:
    from mpi4py import MPI

    if operation == "bcast":
        return [
            Contender("bare Bcast", lambda: comm.Bcast(array), ceiling=True),
            Contender("bare Ibcast", lambda: comm.Ibcast(array).Wait(), ceiling=True),
        ]
    # Sums would grow beyond all bounds from repeat to repeat; the largest does not.
    return [
        Contender(
            "bare Allreduce",
            lambda: comm.Allreduce(MPI.IN_PLACE, array, MPI.MAX),
            ceiling=True,
        ),
        Contender(
            "bare Iallreduce",
            lambda: comm.Iallreduce(MPI.IN_PLACE, array, MPI.MAX).Wait(),
            ceiling=True,
        ),
    ]
