# SPDX-License-Identifier: Apache-2.0
"""Horovod elastic's states and `run`, without Horovod: commits, roll backs, restarts."""

import os
import signal

import numpy as np
import pytest
from mpi4py import MPI

from mpi_ckpt import KeepLast, Options, RNGState
from mpi_ckpt.errors import (
    CheckpointError,
    CollectiveError,
    NoCheckpointError,
    OptionsError,
    RegistrationError,
    StateMismatchError,
)
from mpi_ckpt.integrations.horovod import (
    ElasticSampler,
    HostsUpdatedInterrupt,
    ObjectState,
    RollBackError,
    TorchState,
    configure,
    run,
)
from tests.ranks import assert_same, same_error

torch = pytest.importorskip("torch")

BLOCKING = Options(interval=1, sync=False, deadline_seconds=35, retention=KeepLast(2))
IN_MEMORY = Options(sync=False, deadline_seconds=35, asynchronous=True)


@pytest.fixture(params=[BLOCKING, IN_MEMORY], ids=["each on disk", "in memory"])
def options(request):
    return request.param


@pytest.fixture(autouse=True)
def configured(comm, shared_path, monkeypatch):
    """Commits of a test go to a directory of its own; all ranks train."""
    monkeypatch.delenv("MPI_CKPT_DIR", raising=False)
    configure(shared_path / "commits", options=BLOCKING, comm=comm)
    yield shared_path / "commits"
    configure()


def make_training(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer


def step(model, optimizer, value=1.0):
    optimizer.zero_grad()
    model(torch.full((1, 3), value)).sum().backward()
    optimizer.step()


def weights(model):
    return [parameter.tolist() for parameter in model.parameters()]


def make_state(comm, **attributes):
    """Make a state that is another one on each rank."""
    model, optimizer = make_training(comm.rank)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    return TorchState(model=model, optimizer=optimizer, scheduler=scheduler, **attributes)


def test_restore_undoes_everything_that_was_changed_in_place(comm, options, configured):
    configure(configured, options=options, comm=comm)
    state = make_state(
        comm,
        epoch=3,
        history=[1, {"loss": [0.5]}],
        tensor=torch.arange(3.0),
        array=np.arange(4),
        nothing=None,
        sampler=ElasticSampler(range(40)),
    )
    with state:
        state.sync()
        step(state.model, state.optimizer)
        state.history[1]["loss"].append(0.25)
        state.sampler.record_batch(0, 2)
        state.commit()
        expected = weights(state.model)
        moments = state.optimizer.state_dict()["state"][0]["exp_avg"].tolist()
        tensor = state.tensor

        step(state.model, state.optimizer)
        state.scheduler.step()
        state.epoch = "another kind"
        state.history[1]["loss"].append(7)
        state.history.append("more")
        state.tensor += 1
        state.array[2] = 9
        state.nothing = {"a": 1}
        state.later = 5
        state.sampler.record_batch(1, 2)
        state.sampler.set_epoch(1)
        state.restore()

        assert weights(state.model) == expected
        assert state.optimizer.state_dict()["state"][0]["exp_avg"].tolist() == moments
        assert state.optimizer.param_groups[0]["lr"] == 0.01
        assert state.scheduler.last_epoch == 0
        assert (state.epoch, state.history) == (3, [1, {"loss": [0.5, 0.25]}])
        assert state.tensor is tensor
        assert tensor.tolist() == [0, 1, 2]
        assert state.array.tolist() == [0, 1, 2, 3]
        assert state.nothing is None
        assert not hasattr(state, "later")
        assert state.sampler.state_dict() == {"epoch": 0, "processed_num": 2 * comm.size}
        assert state.commits == 1


def test_sync_takes_live_values_and_restore_after_it_brings_nothing_old_back(comm):
    state = make_state(comm, batch=comm.rank, own=[comm.rank])
    with state:
        state.sync()
        state.commit()
        # Live values that no commit knows of, other ones on each rank.
        step(state.model, state.optimizer, 1.0 + comm.rank)
        for group in state.optimizer.param_groups:
            group["lr"] = 0.1 * (comm.rank + 1)
        state.batch, state.own = 23 + comm.rank, [comm.rank, "live"]
        mine = weights(state.model)
        state.sync()
        assert (state.batch, state.own) == (23, [0, "live"])
        assert weights(state.model) == comm.bcast(mine)
        state.restore()
        assert (state.batch, state.own) == (23, [0, "live"])
        assert weights(state.model) == comm.bcast(mine)
        assert state.optimizer.param_groups[0]["lr"] == 0.1


def test_a_new_process_goes_on_from_the_last_durable_commit(comm, configured):
    # More ranks, or fewer: here the first alone, then all.
    if comm.rank == 0:
        configure(configured, options=BLOCKING, comm=MPI.COMM_SELF)
        with make_state(comm, epoch=0, sampler=ElasticSampler(range(100))) as state:
            state.sync()
            state.sampler.record_batch(0, 7)
            state.epoch = 5
            step(state.model, state.optimizer)
        expected = weights(state.model)
    else:
        expected = None
    expected = comm.bcast(expected)
    configure(configured, options=BLOCKING, comm=comm)
    with make_state(comm, epoch=0, sampler=ElasticSampler(range(100))) as state:
        state.sync()
        assert state.epoch == 5
        assert weights(state.model) == expected
        assert state.sampler.processed_num == 7
        left = comm.allgather(list(state.sampler))
    assert len({len(indices) for indices in left}) == 1
    assert len({index for indices in left for index in indices}) == 93


def test_moments_follow_the_names_of_the_model_into_another_order(comm, configured):
    """The next program gives its optimizer the same parameters in another order."""

    def start(*, is_reversed):
        model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in "abc"})
        params = list(model.parameters())
        optimizer = torch.optim.Adam(params[::-1] if is_reversed else params)
        return params, TorchState(model=model, optimizer=optimizer)

    params, state = start(is_reversed=False)
    state.sync()
    for number, param in enumerate(params):
        param.grad = torch.full_like(param, number + 1.0)
    state.optimizer.step()
    state.commit(durable=True)
    state.close()
    params, state = start(is_reversed=True)
    state.sync()
    moments = [state.optimizer.state[param]["exp_avg"].flatten()[0] for param in params]
    assert [round(10 * moment.item()) for moment in moments] == [1, 2, 3, 4, 5, 6]
    state.close()


def test_a_sync_by_hand_in_mid_epoch_divides_the_rest_anew(comm):
    samples = 20 * comm.size
    with make_state(comm, sampler=ElasticSampler(range(samples))) as state:
        state.sync()
        done = []
        for number, index in enumerate(state.sampler):
            done.append(index)
            state.sampler.record_batch(number, 1)
            if number == 4:
                break
        state.sync()
        done = {index for indices in comm.allgather(done) for index in indices}
        left = {i for indices in comm.allgather(list(state.sampler)) for i in indices}
    assert len(done) == 5 * comm.size
    assert left == set(range(samples)) - done


def test_what_is_given_later_is_tracked(comm):
    with ObjectState(epoch=0) as state:
        state.sync()
        state.best = [0.5]
        state.model, state.optimizer = make_training(comm.rank)
        state._own = object()
        state.commit()
        kept = weights(state.model)
        state.best.append(1)
        step(state.model, state.optimizer)
        state.restore()
        assert state.best == [0.5]
        assert weights(state.model) == comm.bcast(kept)
        del state.best
        state.commit()
        state.restore()
        assert not hasattr(state, "best")


def test_a_model_that_takes_anothers_place_gets_the_committed_values(comm):
    with make_state(comm) as state:
        state.sync()
        kept = weights(state.model)
        state.model, _ = make_training(100)
        assert weights(state.model) != kept
        state.restore()
        assert weights(state.model) == kept


def test_what_cannot_be_saved_is_refused_when_it_is_set(comm):
    with pytest.raises(RegistrationError, match=r"'loader' .* cannot be saved: loader is"):
        ObjectState(loader=object())
    state = ObjectState(epoch=0)
    with pytest.raises(RegistrationError, match="begins with an underscore"):
        state.ranks = comm
    with pytest.raises(RegistrationError, match="'commit' has another meaning"):
        state.commit = 3
    state._loader = object()


def test_states_of_the_package_can_be_tracked_too(comm):
    with ObjectState(rng=RNGState()) as state:
        state.sync()
        state.commit()
        drawn = np.random.random(3).tolist()
        state.restore()
        assert np.random.random(3).tolist() == drawn


def test_commit_before_sync_and_restore_of_nothing_are_refused(comm):
    state = ObjectState(epoch=0)
    with same_error(comm, CheckpointError, "commit() before the first sync()"):
        state.commit()
    with same_error(comm, NoCheckpointError, "nothing was committed yet"):
        state.restore()
    state.sync()
    state.close()


def test_a_directory_is_needed(comm):
    configure(comm=comm)
    with same_error(comm, OptionsError, "MPI_CKPT_DIR", "configure(directory)"):
        ObjectState(epoch=0).sync()


def test_durable_commits_are_on_disk_when_they_return(comm, configured):
    configure(configured, options=IN_MEMORY, comm=comm)
    with ObjectState(epoch=0) as state:
        state.sync()
        state.commit()
        comm.Barrier()
        assert list(configured.glob("checkpoint-*")) == []
        state.epoch = 1
        state.commit(durable=True)
        assert [path.name for path in configured.glob("checkpoint-*")] == [
            "checkpoint-00000001"
        ]
        comm.Barrier()


def test_without_memory_a_restore_reads_the_last_durable_commit(comm, configured):
    options = Options(interval=2, sync=False)
    configure(configured, options=options, comm=comm, memory=None)
    with ObjectState(epoch=0) as state:
        state.sync()
        state.epoch = 7
        state.restore()
        assert state.epoch == 0
        for state.epoch in range(1, 4):
            state.commit()
        state.restore()
        assert (state.epoch, state.commits) == (2, 2)


def test_every_rank_may_hold_the_copy(comm, configured):
    configure(configured, options=IN_MEMORY, comm=comm, memory="all")
    with make_state(comm, own=[comm.rank]) as state:
        state.sync()
        step(state.model, state.optimizer)
        state.commit()
        kept = weights(state.model)
        step(state.model, state.optimizer)
        state.own.append("more")
        state.restore()
        assert (weights(state.model), state.own) == (kept, [0])
        assert_same(comm, kept)


@pytest.mark.parametrize("differ", ["names", "kinds", "optimizers"])
def test_ranks_that_track_different_things_get_one_error(peers, differ):
    model, optimizer = make_training(0)
    state = TorchState(model=model, optimizer=optimizer, epoch=0)
    state.sync()
    last = peers.rank == peers.size - 1
    if last and differ == "names":
        state.extra = 1
    elif last and differ == "kinds":
        state.epoch = ElasticSampler(range(4))
    elif last:
        state.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for doing in (state.commit, state.sync, state.restore):
        with same_error(
            peers,
            RegistrationError,
            "the ranks track different attributes",
            f"rank {peers.size - 1} on ",
            {"names": "extra (value)", "kinds": "HorovodSampler", "optimizers": "SGD"}[
                differ
            ],
        ):
            doing()
    # Nothing was changed, and once they agree they go on.
    state.optimizer, state.epoch = optimizer, 7
    if last and differ == "names":
        del state.extra
    state.commit()
    state.close()


def test_models_of_different_shapes_get_one_error(peers):
    model = torch.nn.Linear(3, 2 + (peers.rank == peers.size - 1))
    state = TorchState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with state, same_error(peers, StateMismatchError, "weight"):
        state.sync()


def test_ranks_that_call_different_methods_go_back_together(peers):
    state = ObjectState(epoch=0)
    state.sync()
    last = peers.rank == peers.size - 1
    with same_error(peers, RollBackError, "do different things", "commit()", "restore()"):
        state.restore() if last else state.commit()
    state.epoch = 3
    state.restore()
    assert state.epoch == 0
    state.close()


def test_run_syncs_trains_and_leaves_a_durable_commit(comm, configured):
    configure(configured, options=IN_MEMORY, comm=comm)

    @run
    def train(state, until, *, by):
        """Count."""
        while state.epoch < until:
            state.epoch += by
            state.seen.append(state.epoch)
            state.commit()
        return state.epoch

    assert train.__doc__ == "Count."
    assert train(ObjectState(epoch=comm.rank, seen=[]), 3, by=1) == 3
    again = ObjectState(epoch=0, seen=[])
    assert train(again, 5, by=1) == 5
    assert again.seen == [1, 2, 3, 4, 5]
    # The same object once more.
    assert train(again, 6, by=1) == 6


def test_run_goes_back_when_any_rank_says_so(comm):
    events = []

    class Told(ObjectState):
        def reset(self):
            events.append("reset")

    @run(tries=2)
    def train(state):
        events.append(f"from {state.epoch}")
        while state.epoch < 4:
            state.epoch += 1
            state.seen.append(state.epoch)
            if events.count("from 0") == 1 and state.epoch == 1:
                raise RollBackError("at once, on all ranks")
            if "at 2" not in events and state.epoch == 3 and comm.rank == 0:
                raise RollBackError("on one rank")
            state.commit()

    state = Told(epoch=0, seen=[])
    state.register_reset_callbacks([lambda: events.append("called")])
    state.register_reset_callbacks([lambda: events.append(f"at {state.epoch}")])
    train(state)
    assert state.seen == [1, 2, 3, 4]
    assert_same(comm, events)
    assert events == [
        *("from 0", "reset", "called", "at 0", "from 0"),
        *("reset", "called", "at 2", "from 2"),
    ]


def test_run_does_not_try_one_commit_for_ever(comm):
    tries = []

    @run(tries=3)
    def train(state):
        while True:
            state.epoch += 1
            if state.epoch == 3:
                tries.append(state.commits)
                raise RollBackError(f"shapes do not match on rank {comm.rank}")
            state.commit()

    state = ObjectState(epoch=0)
    with same_error(
        comm,
        CollectiveError,
        "3 times in a row",
        "the states hold commit 2",
        f"shapes do not match on rank {comm.size - 1}",
    ) as caught:
        train(state)
    assert isinstance(caught.error.__cause__, RollBackError)
    assert tries == [2, 2, 2]
    assert state.epoch == 2


def test_failures_after_different_commits_are_not_counted_together(comm):
    failed = set()

    @run(tries=2)
    def train(state):
        while state.epoch < 5:
            state.epoch += 1
            if state.epoch not in failed:
                failed.add(state.epoch)
                raise RollBackError("once each")
            state.commit()

    state = ObjectState(epoch=0)
    train(state)
    assert failed == {1, 2, 3, 4, 5}


def test_other_errors_end_a_run_and_the_next_one_goes_on(comm, configured):
    @run
    def train(state, *, fail):
        state.epoch += 1
        state.seen = [*getattr(state, "seen", []), state.epoch]
        state.commit()
        state.epoch = 100
        if fail:
            raise ZeroDivisionError("a bug of the program")

    with same_error(comm, ZeroDivisionError):
        train(ObjectState(epoch=0), fail=True)
    comm.Barrier()
    state = ObjectState(epoch=0)
    with same_error(comm, ZeroDivisionError):
        train(state, fail=True)
    assert (state.epoch, state.commits) == (100, 2)
    comm.Barrier()
    # The same object: it begins with what it has committed.
    train(state, fail=False)
    assert (state.epoch, state.commits) == (100, 3)
    again = ObjectState(epoch=0)
    with again:
        again.sync()
        assert (again.epoch, again.seen) == (100, [1, 2, 3])


@pytest.mark.parametrize("teller", [0, -1], ids=["root", "the last rank"])
def test_a_notice_on_any_rank_lets_all_meet_anew_with_live_values(comm, teller):
    starts, sampler = [], ElasticSampler(range(64), shuffle=False)

    @run
    def train(state):
        starts.append((state.batch, len(state.sampler)))
        while state.batch < 4:
            state.batch += 1
            state.sampler.record_batch(0, 1)
            if len(starts) == 1 and state.batch == 2 and comm.rank == teller % comm.size:
                state.on_hosts_updated(1.0, 2)
            state.check_host_updates()

    state = ObjectState(batch=0, sampler=sampler)
    train(state)
    # It was not committed: what the attributes held is what went on, and the sampler has
    # shared out what was left, which Horovod's does not when it skips the sync.
    shares = [-(-left // comm.size) for left in (64, 64 - 2 * comm.size)]
    assert starts == [(0, shares[0]), (2, shares[1])]
    assert state.batch == 4


def test_the_interrupt_comes_out_of_a_commit_that_is_made(comm):
    with ObjectState(epoch=0) as state:
        state.sync()
        state.epoch = 1
        state.on_hosts_updated()
        with pytest.raises(HostsUpdatedInterrupt):
            state.commit()
        state.epoch = 2
        state.restore()
        assert state.epoch == 1
        state.check_host_updates()  # heard once


def test_ranks_that_leave_take_nothing_with_them(comm, configured):
    """The job goes on with fewer ranks in one process, as after a removal of hosts."""
    sampler = ElasticSampler(range(24), shuffle=False)
    state = ObjectState(epoch=0, sampler=sampler)
    state.sync()
    sampler.record_batch(0, 2)
    state.close()
    stays = comm.size == 1 or comm.rank < comm.size - 1
    rest = comm.Split(0 if stays else MPI.UNDEFINED)
    if stays:
        configure(configured, options=BLOCKING, comm=rest)
        state.on_reset()
        state.sync()
        assert (sampler.rank, sampler.num_replicas) == (rest.rank, rest.size)
        left = rest.allgather(list(sampler))
        assert {index for indices in left for index in indices} == set(
            range(2 * comm.size, 24)
        )
        state.close()
        rest.Free()


@pytest.mark.parametrize("way", ["commit", "check_host_updates", "save"])
def test_a_request_to_stop_saves_and_all_leave_with_the_code(comm, configured, way):
    configure(configured, options=IN_MEMORY, comm=comm)
    before = signal.getsignal(signal.SIGTERM)

    @run
    def train(state):
        while state.epoch < 500:
            state.epoch += 1
            if state.epoch == 3 and comm.rank == comm.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            getattr(state, way)()

    state = ObjectState(epoch=0)
    with pytest.raises(SystemExit) as leaving:
        train(state)
    assert leaving.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    stopped_at = comm.bcast(state.epoch)
    assert state.epoch == stopped_at < 500
    comm.Barrier()
    again = ObjectState(epoch=0)
    with again:
        again.sync()
        assert again.epoch == stopped_at


def test_closing_leaves_nothing_behind(comm, no_leaks):
    for _ in range(3):
        with ObjectState(epoch=0) as state:
            state.sync()
            state.commit()


def test_run_wants_a_state_and_a_number_of_tries(comm):
    with pytest.raises(OptionsError, match="tries is 0"):
        run(tries=0)
    with pytest.raises(RegistrationError, match="needs a TorchState or"):
        run(lambda state: None)({"epoch": 0})
