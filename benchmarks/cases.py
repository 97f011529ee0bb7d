# SPDX-License-Identifier: Apache-2.0
"""The cases: what is compared with what, on which bytes."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import ceilings
from benchmarks.harness import Contender
from mpi_ckpt import ArrayState, CheckpointManager, KeepLast, Options

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mpi4py import MPI

__all__ = ["CASES"]

State = dict[str, np.ndarray]


def save_case(comm: MPI.Intracomm, directory: Path, state: State) -> list[Contender]:
    """A blocking save until it is durable, all ranks back."""
    manager = _manager(comm, directory / "ours", state)
    raw = directory / f"raw-{comm.rank}"
    nbytes = sum(array.nbytes for array in state.values())

    def on_root(act: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            if comm.rank == 0:
                act()
            comm.Barrier()

        return run

    def clear() -> None:
        raw.unlink(missing_ok=True)

    return [
        Contender(
            "raw direct write",
            on_root(lambda: ceilings.write_direct(raw, nbytes)),
            clear,
            ceiling=True,
        ),
        Contender(
            "raw buffered write + fsync",
            on_root(lambda: ceilings.write_buffered(raw, state.values())),
            clear,
            ceiling=True,
        ),
        Contender("torch.save + fsync", on_root(lambda: _torch_save(raw, state)), clear),
        Contender("mpi_ckpt save", manager.save),
    ]


def restore_case(comm: MPI.Intracomm, directory: Path, state: State) -> list[Contender]:
    """A restore with a cold cache until every rank is ready to train."""
    manager = _manager(comm, directory / "ours", state)
    report = manager.save()
    file = directory / "torch.pt"
    if comm.rank == 0:
        _torch_save(file, state)
    comm.Barrier()
    shard = next(report.path.glob("*.safetensors"))

    def cold() -> None:
        if comm.rank == 0:
            ceilings.drop_cache(directory)

    def read_raw() -> None:
        if comm.rank == 0:
            ceilings.read_direct(shard)
        comm.Barrier()

    return [
        Contender("raw direct read", read_raw, cold, ceiling=True),
        Contender("torch.load on every rank", lambda: _torch_load(file, state), cold),
        Contender("mpi_ckpt restore", manager.restore, cold),
    ]


def sync_case(comm: MPI.Intracomm, directory: Path, state: State) -> list[Contender]:
    """Replicas made equal: when they are, and when every leaf differs."""
    manager = _manager(comm, directory / "ours", state)
    other = np.random.default_rng(comm.rank)

    def change() -> None:
        for array in state.values():
            array[0] = other.random()

    def bcast() -> None:
        for array in state.values():
            comm.Bcast(array)

    return [
        Contender("Bcast of all leaves", bcast, ceiling=True),
        Contender("mpi_ckpt sync, equal", manager.sync),
        Contender("mpi_ckpt sync, all differ", manager.sync, change),
    ]


CASES: dict[str, Callable[[MPI.Intracomm, Path, State], list[Contender]]] = {
    "save": save_case,
    "restore": restore_case,
    "sync": sync_case,
}


def _manager(comm: MPI.Intracomm, root: Path, state: State) -> CheckpointManager:
    if comm.rank == 0:
        shutil.rmtree(root, ignore_errors=True)
    comm.Barrier()
    options = Options(retention=KeepLast(1), preemption_signals=())
    return CheckpointManager(root, [ArrayState("adam", state)], comm=comm, options=options)


def _torch_save(path: Path, state: State) -> None:
    import os

    import torch

    with path.open("wb") as file:
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, file)
        file.flush()
        os.fsync(file.fileno())


def _torch_load(path: Path, state: State) -> None:
    import torch

    for name, tensor in torch.load(path, weights_only=True).items():
        state[name][:] = tensor.numpy()
