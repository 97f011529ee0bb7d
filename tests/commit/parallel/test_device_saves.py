# SPDX-License-Identifier: Apache-2.0
"""Saves and restores of tensors on a device, against a stand-in that works late."""

import threading

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from mpi_ckpt import CheckpointManager, ObjectState, Options, TrainState
from mpi_ckpt.engine.sync import replicas
from mpi_ckpt.errors import StageError
from mpi_ckpt.memory import Memory
from mpi_ckpt.options import IO
from tests.ranks import manager, same_error
from tests.stand_in import StandIn, install

CHUNK = 64 << 10
LATER = {"asynchronous": True}


@pytest.fixture(params=["late", "hasty"])
def device(request, monkeypatch):
    device = StandIn(hasty=request.param == "hasty")
    yield install(device, monkeypatch, chunk_bytes=CHUNK)
    assert device.faults == []


class Training:
    """A model and Adam on a device, whose steps the device makes when it gets to it."""

    def __init__(self, device, *, overlap=False, width=300):
        torch.manual_seed(3)
        self.device = device
        self.module = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.module(torch.ones(4, width)).square().mean().backward()
        self.optimizer.step()
        device.move(*self.tensors())
        self.state = TrainState(self.module, self.optimizer, overlap=overlap)

    def tensors(self):
        moments = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if value.dim()
        ]
        return [*self.module.parameters(), *self.module.buffers(), *moments]

    def train(self, by):
        """Give the device the work of a step; torch sees the call, the host no result."""
        for hook in _global_optimizer_pre_hooks.values():
            hook(self.optimizer, (), {})
        tensors = self.tensors()
        self.device.work(lambda: [one.data.add_(by) for one in tensors])

    def values(self):
        return [one.detach().clone() for one in self.tensors()]

    def expected(self, by):
        return [one + by for one in self.values()]


def alike(values, others):
    return all(map(torch.equal, values, others))


def restored_values(comm, path, device):
    """Return the values of another training after a restore."""
    other = Training(device)
    with manager(path, other.state, comm=comm) as mine:
        mine.restore()
    return other.values()


@pytest.mark.parametrize(
    "options", [{}, LATER, {"io": IO(digest_threads=3)}, {"writers": "all"}]
)
def test_a_save_has_what_the_step_before_it_made(comm, shared_path, device, options):
    training = Training(device)
    expected = training.expected(2)
    with manager(shared_path, training.state, comm=comm, **options) as mine:
        with device.on(device.stream()):
            training.train(2)
            mine.save()
            training.train(100)
        mine.wait()
    assert alike(restored_values(comm, shared_path, device), expected)


@pytest.mark.parametrize("sync", [True, False])
def test_an_overlapped_save_has_what_was_there_at_the_save(comm, shared_path, device, sync):
    training = Training(device, overlap=True)
    expected = training.expected(2)
    with manager(shared_path, training.state, comm=comm, asynchronous=True) as mine:
        with device.on(device.stream()):
            training.train(2)
            mine.save(sync=sync)
            training.train(100)
        mine.wait()
    assert alike(restored_values(comm, shared_path, device), expected)


def test_a_copy_in_memory_has_it_too(comm, shared_path, device):
    training = Training(device)
    expected = training.expected(2)
    options = Options(preemption_signals=(), deadline_seconds=35.0)
    with CheckpointManager(
        shared_path, [training.state], comm=comm, memory=Memory(), options=options
    ) as mine:
        training.train(2)
        mine.remember()
        training.train(100)
        device.synchronize()
        mine.restore()
    assert alike(training.values(), expected)


@pytest.mark.parametrize("options", [{"io": IO(reuse=False)}, LATER])
def test_the_bytes_leave_the_device_once(comm, shared_path, device, options, monkeypatch):
    monkeypatch.setattr(replicas, "WAITING_BYTES_MIN", 0)  # as of large states
    state = ObjectState("big", {"x": device.tensor(torch.rand(1_000_000))})
    with manager(shared_path, state, comm=comm, **options) as mine:
        mine.save()
        mine.wait()
        device.copied["to host"] = 0
        state.value["x"].add_(1)
        mine.save()
        mine.wait()
    assert device.copied["to host"] == 4_000_000


def test_the_arena_is_pinned_once_and_let_go(comm, shared_path, device):
    state = ObjectState("big", {"x": device.tensor(torch.rand(1_000_000))})
    with manager(shared_path, state, comm=comm, **LATER) as mine:
        for _ in range(3):
            mine.save()
            mine.wait()
            large = [n for n in device.pinned.values() if n >= 4_000_000]
            assert len(large) == (comm.rank == 0)
    assert not [n for n in device.pinned.values() if n >= 4_000_000]


def test_replicas_on_devices_are_made_equal(comm, shared_path, device):
    training = Training(device)
    with manager(shared_path, training.state, comm=comm) as mine:
        mine.sync()
        expected = training.values()
        if comm.rank == comm.size - 1:
            weight = training.module[0].weight.data
            device.work(lambda: weight.view(torch.int32).view(-1)[7].bitwise_xor_(1))
        report = mine.sync()
    assert bool(report.differing) == (comm.size > 1)
    assert comm.size == 1 or alike(training.values(), expected)


def test_a_restore_waits_for_the_work_before_it_and_is_done_after_it(
    comm, shared_path, device
):
    training = Training(device)
    expected = training.values()
    with manager(shared_path, training.state, comm=comm) as mine:
        mine.save()
        training.train(100)
        mine.restore()
    # On no stream anything is left to do.
    assert alike(training.values(), expected)


CAUSES = {
    "captured in a graph": lambda training, device: _capture(training, device),
    "capturable": lambda training, device: training.optimizer.param_groups[0].update(
        capturable=True
    ),
    "keeps captured graphs": lambda training, device: setattr(device, "graphs", True),
}


def _capture(training, device):
    device.capturing = True
    training.train(0)
    device.capturing = False


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("cause", CAUSES)
def test_overlap_is_refused_where_a_graph_may_replay(
    comm, shared_path, device, cause, sync
):
    training = Training(device, overlap=True)
    with manager(shared_path, training.state, comm=comm, **LATER) as mine:
        before = mine.save(sync=sync)
        mine.wait()
        CAUSES[cause](training, device)
        with same_error(comm, StageError, cause, "overlap=True", "state 'train'"):
            mine.save(sync=sync)
    assert before is not None


def test_a_graph_does_not_matter_without_overlap(comm, shared_path, device):
    training = Training(device)
    device.graphs = True
    with manager(shared_path, training.state, comm=comm, **LATER) as mine:
        mine.save()
        mine.wait()


def test_copies_behind_the_training_are_made_on_another_thread(
    comm, shared_path, device, monkeypatch
):
    threads = set()
    real = device.copy
    monkeypatch.setattr(
        device,
        "copy",
        lambda *given: (threads.add(threading.current_thread()), real(*given)),
    )
    training = Training(device, overlap=True)
    with manager(shared_path, training.state, comm=comm, **LATER) as mine:
        mine.save(sync=False)
        mine.wait()
    if comm.rank == 0:
        assert threads - {threading.main_thread()}
