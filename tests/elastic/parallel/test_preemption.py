# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: noticed on one rank, obeyed by all at the same step."""

import os
import signal
import socket
import time

import pytest

from mpi_ckpt import ObjectState, StopWhen
from mpi_ckpt.elastic import requests
from mpi_ckpt.engine.steps import stepping
from mpi_ckpt.errors import OptionsError, StageError
from tests.ranks import assert_same, manager, same_error

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
LIMIT = 500


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    """Forget real schedulers."""
    for name in ("MPI_CKPT_DEADLINE", "SLURM_JOB_END_TIME", "PBS_WALLTIME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["short steps", "long steps"])
def delay(request, monkeypatch):
    """Steps later that a request is obeyed: votes on short steps are read at the next."""
    is_long = request.param == "long steps"
    monkeypatch.setattr(stepping, "_LONG_STEP_SECONDS", 0.0 if is_long else 1e9)
    return 0 if is_long else 1


class Counter(ObjectState):
    """Counts; does something more at its turn to be saved or loaded."""

    at_save = at_load = staticmethod(lambda: None)

    def __init__(self):
        super().__init__("counter", 0)

    def capture(self):
        self.at_save()
        return super().capture()

    def accept(self, value):
        super().accept(value)
        self.at_load()


@pytest.fixture
def counter():
    return Counter()


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def train(checkpoints, counter, *, until=LIMIT, act=lambda step: None):
    """Take steps until told to stop; return how many there were."""
    for step in range(1, until + 1):
        counter.value = checkpoints.steps + 1
        act(step)
        if checkpoints.step():
            return step
    return None


def saved(checkpoints):
    return [info.step for info in checkpoints.generations()]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_on_one_rank_stops_all(comm, shared_path, counter, number, delay):
    last = comm.size - 1
    with manager(shared_path, counter, preemption_signals=SIGNALS) as checkpoints:

        def act(step):
            assert checkpoints.exit_code == 0 or comm.rank == last
            if comm.rank == last and step == 4:
                send(number)

        step = train(checkpoints, counter, act=act)
        assert_same(comm, step)
        assert step == 4 + delay
        assert checkpoints.exit_code == 143
        assert saved(checkpoints) == [step]
        # It goes on saying so, and a second request is as good as the first.
        assert checkpoints.step() is True
        counter.value = 0
        checkpoints.restore()
    assert_same(comm, counter.value)
    assert counter.value == 4 + delay


def test_a_signal_on_all_ranks(comm, shared_path, counter, delay):
    options = {"preemption_signals": (signal.SIGUSR1,), "stop": StopWhen(exit_code=7)}
    with manager(shared_path, counter, interval=1, **options) as checkpoints:

        def act(step):
            if step == 2:
                send(signal.SIGUSR1)

        assert train(checkpoints, counter, act=act) == 2 + delay
        assert checkpoints.exit_code == 7
        assert saved(checkpoints) == list(range(1, 3 + delay))


def test_a_signal_before_the_first_step(comm, shared_path, counter):
    with manager(shared_path, counter, preemption_signals=SIGNALS) as checkpoints:
        send()
        assert train(checkpoints, counter) == 1
        assert saved(checkpoints) == [1]


def test_a_handler_of_the_users_is_called_too(comm, shared_path, counter):
    seen = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: seen.append("mine"))
    try:
        with manager(
            shared_path, counter, preemption_signals=(signal.SIGUSR1,)
        ) as checkpoints:
            send(signal.SIGUSR1)
            assert checkpoints.step() is True
        assert seen == ["mine"]
        send(signal.SIGUSR1)
        assert seen == ["mine", "mine"]
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_last_save_that_fails_can_be_tried_again(comm, shared_path, counter):
    last = comm.size - 1
    with manager(shared_path, counter, preemption_signals=SIGNALS) as checkpoints:
        if comm.rank == last:
            send()
            counter.value = object()
        with same_error(comm, StageError, f"rank {last} of"):
            checkpoints.step()
        counter.value = 1
        assert checkpoints.step() is True
        assert saved(checkpoints) == [2]


@pytest.mark.usefixtures("delay")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_during_a_save(comm, shared_path, counter, asynchronous):
    options = {"preemption_signals": SIGNALS, "asynchronous": asynchronous, "interval": 3}
    with manager(shared_path, counter, **options) as checkpoints:
        if comm.rank == comm.size - 1:
            counter.at_save = send
        # The vote that is posted after the save knows of it.
        assert train(checkpoints, counter) == 4
        assert saved(checkpoints) == [3, 4], "what was being saved is not lost"


def test_a_signal_during_a_restore(comm, shared_path, counter):
    with manager(shared_path, counter, preemption_signals=SIGNALS) as checkpoints:
        counter.value = 17
        checkpoints.save(step=17)
        if comm.rank == comm.size - 1:
            counter.at_load = send
        assert checkpoints.restore().step == 17
        assert counter.value == 17
        assert train(checkpoints, counter) == 1
        assert saved(checkpoints) == [17, 18]


def test_two_signals_are_one_request(comm, shared_path, counter, delay):
    with manager(shared_path, counter, preemption_signals=SIGNALS) as checkpoints:

        def act(step):
            if comm.rank == 0 and step in (2, 3):
                send()

        assert train(checkpoints, counter, act=act) == 2 + delay
        assert saved(checkpoints) == [2 + delay]


def test_a_halt_file_stops_all_and_stays(comm, shared_path, counter, monkeypatch, delay):
    monkeypatch.setattr(requests, "_PAUSE_SECONDS", 0.0)

    def act(step):
        if step == 3 and comm.rank == 0:
            (shared_path / "halt").touch()

    with manager(shared_path, counter) as checkpoints:
        assert train(checkpoints, counter, act=act) == 3 + delay
        assert checkpoints.exit_code == 143
        assert saved(checkpoints) == [3 + delay]
    with manager(shared_path, counter) as checkpoints:
        checkpoints.restore()
        # The next run finds it as well, before it has trained if it asks.
        assert checkpoints.should_stop() is True
        comm.barrier()
        if comm.rank == 0:
            (shared_path / "halt").unlink()
    with manager(shared_path, counter) as checkpoints:
        checkpoints.restore()
        assert train(checkpoints, counter, until=3) is None


def test_a_function_on_root_stops_all(comm, shared_path, counter, monkeypatch, delay):
    monkeypatch.setattr(requests, "_PAUSE_SECONDS", 0.0)
    stop = False

    def asked():
        assert comm.rank == 0
        return stop

    def act(step):
        nonlocal stop
        stop = step >= 5

    # Another function on every rank, as after any `def`: options are the same all the same.
    with manager(shared_path, counter, stop=StopWhen(asked=asked)) as checkpoints:
        assert train(checkpoints, counter, act=act) == 5 + delay


def test_a_function_that_fails_on_root_stops_nobody(comm, shared_path, counter):
    stop = StopWhen(asked=lambda: [][0])
    with manager(shared_path, counter, stop=stop) as checkpoints:
        assert train(checkpoints, counter, until=10) is None


def test_the_end_of_the_job_stops_all_in_time(comm, shared_path, counter, monkeypatch):
    start = time.monotonic()
    # Root is told the end; what other hosts believe of it, or of the time, is not asked.
    told = time.time() + 2.0 if comm.rank == 0 else 1.1e9
    monkeypatch.setenv("MPI_CKPT_DEADLINE", str(told))
    if comm.rank > 0:
        monkeypatch.setattr(time, "time", lambda: 5e9)
    with manager(shared_path, counter, stop=StopWhen(margin_seconds=0)) as checkpoints:
        checkpoints.save()  # tells that a save takes next to nothing
        step = train(checkpoints, counter, until=10**9, act=lambda step: time.sleep(0.005))
        took = comm.bcast(time.monotonic() - start)
        assert_same(comm, step)
        # Half of so short a time belongs to the training.
        assert took > 0.9
        assert checkpoints.exit_code == 143
        assert saved(checkpoints)[-1] == step


def test_an_end_that_has_passed(comm, shared_path, counter, monkeypatch, caplog):
    monkeypatch.setenv("MPI_CKPT_DEADLINE", str(time.time() - 3600))
    with manager(shared_path, counter) as checkpoints:
        assert train(checkpoints, counter) == 1
        assert saved(checkpoints) == [1]
    said = [text for text in caplog.messages if "should have ended" in text]
    assert len(said) == (comm.rank == 0)


def test_variables_of_another_job_stop_nobody(comm, shared_path, counter, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() - 86400)))
    with manager(shared_path, counter) as checkpoints:
        assert train(checkpoints, counter, until=5) is None
        assert checkpoints.exit_code == 0


def test_rubbish_in_the_users_variable_is_one_error(comm, shared_path, monkeypatch):
    if comm.rank == 0:  # mpirun need not pass it on
        monkeypatch.setenv("MPI_CKPT_DEADLINE", "4:00:00")
    with same_error(
        comm, OptionsError, "MPI_CKPT_DEADLINE='4:00:00' is not a point in time"
    ):
        manager(shared_path)


def test_asking_counts_no_step_and_saves_nothing(comm, shared_path, counter):
    options = {"preemption_signals": SIGNALS, "interval": 1}
    with manager(shared_path, counter, **options) as checkpoints:
        assert checkpoints.should_stop() is False
        checkpoints.step()
        assert checkpoints.should_stop() is False
        if comm.rank == comm.size - 1:
            send()
        assert checkpoints.should_stop() is True
        assert (checkpoints.exit_code, checkpoints.steps, saved(checkpoints)) == (
            143,
            1,
            [1],
        )
        assert checkpoints.should_stop() is True
        # Agreed on already: the next step obeys, whatever was under way.
        assert checkpoints.step() is True
        assert saved(checkpoints) == [1, 2]


@pytest.mark.parametrize("call", ["step", "should_stop"])
def test_who_asked_is_told_by_root(comm, shared_path, counter, caplog, call):
    asking = comm.size - 1
    with manager(shared_path, counter, preemption_signals=SIGNALS) as checkpoints:
        checkpoints.step()
        if comm.rank == asking:
            send(signal.SIGUSR2)
        while not getattr(checkpoints, call)():
            pass
        told = [text for text in caplog.messages if text.startswith("asked to stop")]
        checkpoints.wait()
    if comm.rank == 0:
        (line,) = told
        assert (
            f"(SIGUSR2 on rank {asking} of {comm.size} on {socket.gethostname()})" in line
        )
    else:
        assert told == []


def test_a_handler_that_takes_our_place_is_told_once(comm, shared_path, counter, caplog):
    with manager(shared_path, counter, preemption_signals=SIGNALS) as checkpoints:
        ours = signal.signal(signal.SIGUSR1, lambda *_: None)
        checkpoints.save()
        checkpoints.save()
        signal.signal(signal.SIGUSR1, ours)
    told = [text for text in caplog.messages if "a handler for SIGUSR1 was" in text]
    assert len(told) == (comm.rank == 0)
