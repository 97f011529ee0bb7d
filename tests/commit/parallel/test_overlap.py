# SPDX-License-Identifier: Apache-2.0
"""Saves whose copy goes on behind forward and backward."""

import threading

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpi_ckpt import TrainState
from mpi_ckpt.errors import RegistrationError, SaveError, StageError
from mpi_ckpt.states.buffers.tensor_bytes import TensorBuffer
from tests.ranks import manager, same_error

MAIN = threading.main_thread()


class Training:
    """A small training in which something changes at every line."""

    def __init__(self, *, overlap=True, optimizer=torch.optim.AdamW):
        torch.manual_seed(7)
        self.module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.module[0].bias.requires_grad_(False)
        self.optimizer = optimizer(self.module.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
        self.state = TrainState(
            module=self.module,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            overlap=overlap,
        )
        self.step()

    def step(self):
        self.optimizer.zero_grad()
        self.module(torch.randn(6, 5)).square().mean().backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 0.1)
        self.optimizer.step()
        self.scheduler.step()

    def contents(self):
        captured = self.state.capture()
        leaves = {leaf.spec.name: bytes(leaf.buffer.read()) for leaf in captured.leaves}
        return captured.structure, leaves


class Copier:
    """Stops the copy behind the training's back after so many leaves, until told."""

    def __init__(self, stop_after):
        self.go_on = threading.Event()
        self.copied = 0
        self.stop_after = stop_after
        self.real = TensorBuffer.copy_to

    def __call__(self, buffer, target):
        if threading.current_thread() is not MAIN:
            if self.copied == self.stop_after:
                self.go_on.wait(20)
            self.copied += 1
        self.real(buffer, target)


@pytest.fixture
def copier(monkeypatch):
    def install(stop_after):
        copier = Copier(stop_after)
        monkeypatch.setattr(TensorBuffer, "copy_to", lambda *both: copier(*both))
        return copier

    return install


@pytest.fixture
def before_step():
    """Calls a function when a step begins, before whoever registers a hook later."""
    calls = []

    def call_all(*_):
        for call in calls:
            call()

    hook = register_optimizer_step_pre_hook(call_all)
    yield calls
    hook.remove()


def restored(path, comm):
    other = Training(overlap=False)
    with manager(path, other.state, comm=comm) as mine:
        mine.restore()
    return other.contents()


# 2 linear layers, a norm, and 3 tensors of AdamW for each of 5 trained ones.
LATE_LEAVES = 6 + 3 * 5


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("stop_after", range(LATE_LEAVES + 1))
def test_what_is_saved_is_the_state_at_the_save(
    comm, shared_path, copier, before_step, stop_after, sync
):
    pause = copier(stop_after)
    training = Training()
    # The step is reached with the copy half made; only then does it go on.
    before_step.append(lambda: threading.Timer(0.01, pause.go_on.set).start())
    with manager(shared_path, training.state, comm=comm, asynchronous=True) as mine:
        expected = training.contents()
        mine.save(sync=sync)
        training.step()
        training.step()
        if comm.rank == 0:
            assert pause.copied == LATE_LEAVES
            assert training.contents() != expected
    assert restored(shared_path, comm) == expected


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_every_writer_overlaps_its_share(comm, shared_path, copier, before_step, optimizer):
    pause = copier(0)
    training = Training(optimizer=optimizer)
    before_step.append(lambda: threading.Timer(0.01, pause.go_on.set).start())
    with manager(
        shared_path, training.state, comm=comm, asynchronous=True, writers="all"
    ) as mine:
        expected = training.contents()
        pending = mine.save()
        training.step()
        training.step()
        pending.wait()
    other = Training(overlap=False, optimizer=optimizer)
    with manager(shared_path, other.state, comm=comm) as mine:
        mine.restore()
    assert other.contents() == expected


def test_step_of_any_optimizer_waits(comm, shared_path, copier, before_step):
    pause = copier(1)
    training = Training()
    another = torch.optim.SGD(training.module.parameters(), lr=1.0)
    before_step.append(lambda: threading.Timer(0.01, pause.go_on.set).start())
    with manager(shared_path, training.state, comm=comm, asynchronous=True) as mine:
        expected = training.contents()
        mine.save()
        another.step()
    assert restored(shared_path, comm) == expected


def test_change_that_did_not_wait_fails_the_save(comm, shared_path, copier):
    pause = copier(0)
    training = Training()
    with manager(shared_path, training.state, comm=comm, asynchronous=True) as mine:
        pending = mine.save(sync=False)
        with torch.no_grad():
            training.module[2].weight.add_(1.0)
        pause.go_on.set()
        with same_error(comm, StageError, "module/2.weight", "step()"):
            pending.wait()
        assert mine.generations() == []
        assert mine.save().wait().generation == 1


def test_change_that_torch_does_not_see_is_told_by_its_digest(peers, shared_path, copier):
    pause = copier(0)
    training = Training()
    with manager(shared_path, training.state, comm=peers, asynchronous=True) as mine:
        pending = mine.save()
        training.module[2].weight.data.numpy()[:] = 3.0
        pause.go_on.set()
        with same_error(peers, StageError, "module/2.weight"):
            pending.wait()
        assert mine.generations() == []


def test_failing_copy_holds_nobody_up(comm, shared_path, monkeypatch):
    training = Training()
    real = TensorBuffer.copy_to

    def fail(buffer, target):
        if threading.current_thread() is not MAIN:
            raise MemoryError("the copy failed")
        real(buffer, target)

    with manager(shared_path, training.state, comm=comm, asynchronous=True) as mine:
        monkeypatch.setattr(TensorBuffer, "copy_to", fail)
        pending = mine.save()
        training.step()
        with same_error(comm, SaveError, "the copy failed"):
            pending.wait()
        monkeypatch.undo()
        assert mine.save().wait().generation == 1


def test_sync_waits_before_it_writes_into_the_tensors(comm, shared_path, copier):
    pause = copier(0)
    training = Training()
    with manager(shared_path, training.state, comm=comm, asynchronous=True) as mine:
        expected = training.contents()
        mine.save()
        threading.Timer(0.02, pause.go_on.set).start()
        mine.restore()
        assert training.contents() == expected


def test_blocking_save_of_an_overlapping_state(comm, shared_path):
    training = Training()
    with manager(shared_path, training.state, comm=comm) as mine:
        expected = training.contents()
        mine.save()
        training.step()
    assert restored(shared_path, comm) == expected


def test_overlap_needs_somebody_who_waits():
    with pytest.raises(RegistrationError, match="optimizer"):
        TrainState(module=nn.Linear(1, 1), overlap=True)
