# SPDX-License-Identifier: Apache-2.0
"""Orders in which Horovod, mpi4py and this package can come to life in one process."""

from __future__ import annotations

import numpy as np

from mpi_ckpt.integrations import horovod as beside
from tests.integrations.horovod.playing import error_of


def _manager(root, comm=None):
    from mpi_ckpt import ArrayState, CheckpointManager, Options

    options = Options(preemption_signals=(), deadline_seconds=20)
    state = ArrayState("state", {"x": np.arange(4.0)})
    return CheckpointManager(root, [state], comm=comm, options=options)


def mpi4py_first(root):
    import horovod.torch as hvd
    from mpi4py import MPI

    hvd.init()
    ranks = [(MPI.COMM_WORLD.rank, hvd.rank(), beside.communicator().rank)]
    with _manager(root, beside.communicator()) as manager:
        manager.save(step=1)
        hvd.shutdown()
        alive = not MPI.Is_finalized()
        manager.save(step=2)
        hvd.init()
        ranks.append((MPI.COMM_WORLD.rank, hvd.rank(), beside.communicator().rank))
        manager.save(step=3)
    with _manager(root, beside.communicator()) as manager:
        report = manager.restore()
    value = beside.broadcast_object(MPI.COMM_WORLD.rank, root_rank=1)
    return {"ranks": ranks, "alive": alive, "step": report.step, "value": value}


def ours_first(root):
    with _manager(root) as manager:
        import horovod.torch as hvd

        hvd.init()
        manager.save(step=1)
        hvd.shutdown()
        manager.save(step=2)
        hvd.init()
    return beside.communicator().rank == hvd.rank()


def horovod_first(root):
    import horovod.torch as hvd

    hvd.init()
    refused = [
        error_of(beside.communicator),
        error_of(lambda: _manager(root)),
        error_of(lambda: beside.broadcast_object(1)),
    ]
    hvd.shutdown()
    from mpi4py import MPI

    return {
        "refused": refused,
        "finalized": MPI.Is_finalized(),
        "after": [error_of(beside.communicator), error_of(lambda: _manager(root))],
    }


def funneled(root):
    import mpi4py

    mpi4py.rc.thread_level = "funneled"
    import horovod.torch as hvd
    from mpi4py import MPI

    hvd.init()
    refused = [error_of(beside.communicator), error_of(lambda: _manager(root))]
    hvd.shutdown()
    with _manager(root) as manager:  # without Horovod it is no trouble
        manager.save(step=1)
    return {"refused": refused, "level": MPI.Query_thread() < MPI.THREAD_MULTIPLE}


def without_mpi(root):
    """A Horovod over Gloo, in what it says of itself: this one is built without."""
    import horovod.torch as hvd
    from mpi4py import MPI  # noqa: F401

    hvd.init()
    hvd.mpi_enabled = lambda: False
    refused = [
        error_of(beside.communicator),
        error_of(lambda: _manager(root)),
        error_of(lambda: beside.broadcast_parameters({})),
    ]
    hvd.shutdown()
    return refused


def initialised_on_one(root):
    import horovod.torch as hvd
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 1:
        hvd.init(comm=[1])
    refused = error_of(lambda: _manager(root))
    if MPI.COMM_WORLD.rank == 1:
        hvd.shutdown()
    return refused


def split_and_turned_round(root):
    import horovod.torch as hvd
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    half = world.Split(world.rank % 2, -world.rank)
    hvd.init(comm=half)
    given, found = beside.communicator(half), beside.communicator()
    with _manager(f"{root}/{world.rank % 2}", found) as manager:
        manager.save(step=1)
    refused = error_of(lambda: _manager(root))
    value = beside.broadcast_object(world.rank, root_rank=0)
    hvd.shutdown()
    return {
        "given": given == half,
        "ranks": [hvd_rank_and_size(half), (found.rank, found.size)],
        "refused": refused,
        "value": value,
    }


def hvd_rank_and_size(comm):
    return comm.rank, comm.size


def turned_round():
    import horovod.torch as hvd
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    hvd.init(comm=world.Split(0, -world.rank))
    found = beside.communicator()
    outcome = [hvd.rank(), found.rank, beside.broadcast_object(world.rank, root_rank=0)]
    hvd.shutdown()
    return outcome


def by_ranks():
    import horovod.torch as hvd
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 1:
        return None
    hvd.init(comm=[0, 2])
    found = beside.communicator()
    outcome = [hvd.rank(), found.rank, found.size]
    outcome.append(beside.broadcast_object(MPI.COMM_WORLD.rank, root_rank=1))
    hvd.shutdown()
    return outcome


def process_sets(root):
    import horovod.torch as hvd
    import torch
    from mpi4py import MPI  # noqa: F401

    odd = hvd.ProcessSet([1, 3])
    hvd.init(process_sets=[odd])
    even = hvd.add_process_set([0, 2])
    mine = odd if odd.included() else even
    found = beside.communicator(process_set=mine)
    model = torch.full((3,), float(hvd.rank()))
    beside.broadcast_parameters([model], root_rank=mine.ranks[1], process_set=mine)
    with _manager(f"{root}/{mine.ranks[0]}", found) as manager:
        manager.save(step=hvd.rank())
        step = manager.restore().step
    others = even if mine is odd else odd
    outcome = {
        "rank": [mine.rank(), found.rank],
        "model": model.tolist(),
        "object": beside.broadcast_object(hvd.rank(), mine.ranks[1], process_set=mine),
        "gathered": beside.allgather_object(hvd.rank(), process_set=mine),
        "step": step,
        "stranger": error_of(lambda: beside.communicator(process_set=others)),
        "all": beside.communicator(process_set=hvd.global_process_set).size,
        "root": error_of(lambda: beside.broadcast_object(1, others.ranks[0], None, mine)),
    }
    hvd.shutdown()
    return outcome
