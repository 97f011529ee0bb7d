# SPDX-License-Identifier: Apache-2.0
"""What Horovod elastic's states do, beside what ours do: the same steps on both."""

from __future__ import annotations

import os
import sys
import time

import horovod.torch as hvd
import torch
from mpi4py import MPI

from mpi_ckpt import KeepLast, Options
from mpi_ckpt.integrations import horovod as ours
from tests.integrations.horovod.playing import error_of

COMM = MPI.COMM_WORLD


def _theirs():
    from horovod.torch import elastic

    return elastic.TorchState, elastic.ElasticSampler, elastic.run


def _ours(root, **settings):
    options = Options(interval=1, sync=False, deadline_seconds=20, retention=KeepLast(2))
    ours.configure(root, **{"options": options, **settings})
    return ours.TorchState, ours.ElasticSampler, ours.run


def _classes(whose, root):
    hvd.init()
    return _theirs() if whose == "theirs" else _ours(root)


def _training(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(2, 1, bias=False)
    return model, torch.optim.SGD(model.parameters(), lr=0.1 * (seed + 1), momentum=0.9)


def _set(model, value):
    with torch.no_grad():
        model.weight.fill_(value)


def _weight(model):
    return model.weight[0, 0].item()


def in_place(whose, root):
    """A list is changed in place after a commit, and an attribute is given later."""
    make, _, _ = _classes(whose, root)
    model, optimizer = _training(0)
    state = make(model=model, optimizer=optimizer, history=[1])
    state.sync()
    state.later = [1]
    state.commit()
    state.history.append("uncommitted")
    state.later = "uncommitted"
    state.restore()
    return {"history": state.history, "later": state.later}


def live_weights_old_counters(whose, root):
    """Weights and a counter go on past the last commit; then the ranks sync."""
    make, _, _ = _classes(whose, root)
    model, optimizer = _training(0)
    state = make(model=model, optimizer=optimizer, batch=0)
    state.sync()
    state.batch = 1
    _set(model, 1.0)
    state.commit()
    state.batch = 23
    _set(model, 23.0)
    state.sync()
    return {"weight": _weight(model), "batch": state.batch}


def sync_then_restore(whose, root):
    """Ranks that differ sync, and restore without a commit in between."""
    make, _, _ = _classes(whose, root)
    model, optimizer = _training(hvd.rank())
    _set(model, 10.0 + hvd.rank())
    state = make(model=model, optimizer=optimizer)
    state.sync()
    synced = _weight(model)
    state.restore()
    lr = optimizer.param_groups[0]["lr"]
    return {"synced": synced, "weight": _weight(model), "lr": round(lr, 6)}


def told_on(whose, root, rank):
    """One rank is told that hosts have changed; all look."""
    from horovod.common.exceptions import HostsUpdatedInterrupt

    make, _, _ = _classes(whose, root)
    state = make(batch=0)
    state.sync()
    if hvd.rank() == rank:
        state.on_hosts_updated(1, 2)
    try:
        state.check_host_updates()
    except HostsUpdatedInterrupt:
        return "interrupted"
    return "nothing"


def scheduler_after_sync(whose, root):
    """A scheduler is tracked: does it still set the rate of the optimizer?"""
    make, _, _ = _classes(whose, root)
    model, optimizer = _training(0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    state = make(model=model, optimizer=optimizer, scheduler=scheduler)
    state.sync()
    optimizer.step()
    state.scheduler.step()
    return round(optimizer.param_groups[0]["lr"], 6)


def small_things(whose, root):
    """What is seen on a look at single methods."""
    make, make_sampler, _ = _classes(whose, root)
    sampler = make_sampler(list(range(30)))
    sampler.record_batch(0, 2)
    sampler.set_epoch(0)
    few = make_sampler(list(range(10)))
    few.load_state_dict({"epoch": 0, "processed_num": 9})
    model, optimizer = _training(0)
    state = make(model=model, optimizer=optimizer)
    state.sync()
    _set(model, 1.0)
    state.commit()
    other, _ = _training(1)
    _set(other, 2.0)
    state.model = other
    state.restore()
    return {
        "position": sampler.processed_num,
        "few": error_of(lambda: list(few)),
        "assigned": _weight(other),
    }


def tracks_more_on_one_rank(whose, root):
    """The last rank has an attribute that the others have not."""
    make, _, _ = _classes(whose, root)
    extra = {"extra": 1} if hvd.rank() == hvd.size() - 1 else {}
    state = make(batch=0, **extra)
    error = error_of(state.sync)
    return error and error.splitlines()[0]


def save_on_one_rank(whose, root):
    """One rank commits once more than the others."""
    make, _, _ = _classes(whose, root)
    state = make(batch=0)
    state.sync()
    state.batch = 5
    try:
        if hvd.rank() == 0:
            state.save()
        state.restore()
    except ours.RollBackError as error:
        state.restore()
        return {"batch": state.batch, "told": str(error).splitlines()[1:]}
    return {"batch": state.batch, "told": None}


def mismatched_shapes(whose, root):
    """A plain bug: the shapes of one allreduce differ, again and again."""
    make, _, run = _classes(whose, root)
    tries = []

    class EnoughError(Exception):
        pass

    def train(state):
        tries.append(len(tries))
        if len(tries) > 10:
            raise EnoughError
        hvd.allreduce(torch.ones(2 + hvd.rank()), name=f"bug-{len(tries)}")

    try:
        run(train)(make(batch=0))
    except Exception as error:
        return {"tries": len(tries), "kind": type(error).__name__, "text": str(error)}
    return None


def restarted_with(whose, root):
    """Horovod was given a communicator in another order, and a process set."""
    turned = COMM.Split(0, -COMM.rank)
    evens = hvd.ProcessSet([0])
    hvd.init(comm=turned, process_sets=[evens])
    make, _, run = (
        _theirs() if whose == "theirs" else _ours(root, comm=turned, process_sets=[evens])
    )
    seen = []

    def train(state):
        from horovod.common.exceptions import HorovodInternalError

        seen.append((hvd.rank(), _size_of(evens)))
        if len(seen) == 1:
            raise HorovodInternalError("by hand")
        if whose == "ours" and hvd.rank() == 0:
            hvd.allreduce(torch.ones(1), process_set=evens)
        state.batch = 1

    state = make(batch=0)
    run(train)(state)
    ids = hvd.mpi_ops._basics._get_process_set_ids_and_ranks()
    # A rank that ends shuts Horovod down on the others too.
    COMM.Barrier()
    return {"seen": seen, "sets": sorted(ids), "batch": state.batch}


def _size_of(process_set):
    try:
        return process_set.size()
    except ValueError as error:
        return str(error)


def removal(whose, root):
    """Three ranks become two, and the change is a removal only: no sync in Horovod."""
    from horovod.common.elastic import run_fn
    from horovod.common.exceptions import HostsUpdatedInterrupt

    make, make_sampler, _ = _classes(whose, root)
    sampler = make_sampler(list(range(60)), shuffle=False)
    state = make(sampler=sampler)
    rest = COMM.Split(0 if COMM.rank < 2 else MPI.UNDEFINED)
    if whose == "theirs":
        return _removal_theirs(run_fn, HostsUpdatedInterrupt, state, rest)
    state.sync()
    sampler.record_batch(0, 5)
    state.close()
    hvd.shutdown()
    if COMM.rank == 2:
        return None
    hvd.init(comm=rest)
    ours.configure(root, comm=rest)
    state.on_reset()
    state.sync()
    found = _shares(sampler, rest)
    state.close()
    return found


def _removal_theirs(run_fn, interrupt, state, rest):
    starts = []

    def reset():
        hvd.shutdown()
        if COMM.rank == 2:
            raise SystemExit
        hvd.init(comm=rest)

    def train(state):
        starts.append(1)
        if len(starts) == 1:
            state.sampler.record_batch(0, 5)
            state.commit()
            raise interrupt(True)
        return _shares(state.sampler, rest)

    try:
        return run_fn(train, reset)(state)
    except SystemExit:
        return None


def _shares(sampler, rest):
    size = hvd.size()
    everyone = rest.allgather(list(sampler))
    return {
        "replicas": sampler.num_replicas,
        "size": size,
        "read": sorted(index for indices in everyone for index in indices),
    }


def shut_down_under_us(whose, root):
    """The program shuts Horovod down; the state goes on."""
    make, _, _ = _classes(whose, root)
    model, optimizer = _training(0)
    state = make(model=model, optimizer=optimizer, batch=0)
    state.sync()
    state.batch = 1
    hvd.shutdown()
    try:
        state.commit()
        state.batch = 2
        state.sync()
        state.batch = 3
        state.restore()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return state.batch


def shut_down_in_a_run(root):
    """One rank shuts Horovod down in the midst of a run: all go on from the commit."""
    hvd.init()
    make, _, run = _ours(root)
    model, plain = _training(hvd.rank())
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
    state = make(model=model, optimizer=optimizer, batch=0)
    starts = []

    @run
    def train(state):
        starts.append(state.batch)
        while state.batch < 6:
            if len(starts) == 1 and state.batch == 3 and hvd.rank() == 1:
                hvd.shutdown()
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            state.batch += 1
            state.commit()

    train(state)
    weights = COMM.allgather(_weight(model))
    return {"starts": starts, "batch": state.batch, "equal": len(set(weights)) == 1}


def internal_error_on_one(root):
    """One rank alone finds an error; the other waits for it in Horovod's allreduce."""
    from horovod.common.exceptions import HorovodInternalError

    hvd.init()
    make, _, run = _ours(root)
    starts = []

    @run
    def train(state):
        starts.append(state.batch)
        while state.batch < 4:
            if len(starts) == 1 and state.batch == 2 and hvd.rank() == 1:
                raise HorovodInternalError("seen here only")
            hvd.allreduce(torch.ones(2), name="loss")
            state.batch += 1
            state.commit()
        return state.batch

    return {"batch": train(make(batch=0)), "starts": starts}


def leaves_alone(whose, root, where):
    """Rank 1 has a bug of its own, while rank 0 waits for it in some collective."""
    make, _, run = _classes(whose, root)
    state = make(batch=0)

    def train(state):
        state.batch = 1
        state.commit()
        if hvd.rank() == 1:
            raise ZeroDivisionError("a bug on one rank")
        if where == "mpi4py":
            COMM.Barrier()
        elif where == "horovod":
            hvd.allreduce(torch.ones(1), name="waits")
        else:
            state.commit()

    run(train)(state)


def goes_back_alone(root):
    """Rank 1 goes back, while rank 0 waits for it in a collective of mpi4py."""
    hvd.init()
    make, _, run = _ours(root, options=Options(deadline_seconds=2, sync=False))

    def train(state):
        if hvd.rank() == 1:
            raise ours.RollBackError("seen here only")
        COMM.Barrier()

    run(train)(make(batch=0))


def dies_in(root, where):
    """Rank 1 is killed inside of a collective, or root inside of a save."""
    hvd.init()
    make, _, run = _ours(root)
    state = make(batch=0, ballast=torch.zeros(1 << 20))

    @run
    def train(state):
        begin = state.batch
        while state.batch < begin + 4:
            state.batch += 1
            state.ballast += 1
            if begin == 0 and state.batch == 3:
                _die(root, where)
            hvd.allreduce(torch.ones(1 << 10), name="work")
            state.commit()
        return begin

    return train(state)


def _die(root, where):
    from mpi_ckpt import CheckpointManager

    if where == "horovod" and hvd.rank() == 1:
        hvd.allreduce_async(torch.ones(1 << 10), name="work")
        _kill_self()
    if where == "commit" and hvd.rank() == 1:
        # The ranks have met for it, and wait for this one in what comes next.
        CheckpointManager.step = _kill_self
    if where == "save" and hvd.rank() == 0:
        real = os.fsync

        def fsync(descriptor):
            if any(name.startswith(".partial") for name in os.listdir(root)):
                _kill_self()
            real(descriptor)

        os.fsync = fsync


def _kill_self(*_):
    os.kill(os.getpid(), 9)
    time.sleep(60)


def stands_still(root):
    """Rank 1 is stopped: the others name it when the deadline has passed."""
    hvd.init()
    options = Options(interval=1, deadline_seconds=2, sync=False)
    make, _, _ = _ours(root, options=options)
    state = make(batch=0)
    state.sync()
    if hvd.rank() == 1:
        os.kill(os.getpid(), 19)
    state.commit()


if __name__ == "__main__":
    # As a program of its own, with all that happens where one ends by an exception.
    name, *arguments = sys.argv[1:]
    globals()[name](*arguments)
