# SPDX-License-Identifier: Apache-2.0
"""Trainings that torch cuts over the ranks, with all that a program saves beside them."""

import threading
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpi_ckpt import (
    ArrayState,
    CheckpointManager,
    ElasticSampler,
    EpochState,
    ModuleState,
    Options,
    RNGState,
    TrainState,
    remaining_epochs_until,
)
from mpi_ckpt.elastic import Memory
from mpi_ckpt.errors import DivergedError, StageError
from mpi_ckpt.integrations.torch_distributed import init_process_group
from mpi_ckpt.states.buffers.tensor_bytes import TensorBuffer
from tests.cut.parallel.test_progress import clocks_of
from tests.cut.trainings import KINDS, whole_tensors
from tests.ranks import manager, same_error

# The first mesh of a process takes seconds.
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")]


@pytest.fixture(autouse=True)
def started(peers):
    init_process_group("gloo", comm=peers)
    yield
    peers.Barrier()
    dist.destroy_process_group()


class Program:
    """A training with an averaged copy, a scheduler, and states that are not cut."""

    def __init__(self, comm, seed=0, kind="fsdp", **options):
        self.training = training = KINDS[kind](seed)
        self.average = KINDS[kind](seed).net
        self.scheduler = StepLR(training.optimizer, 2, gamma=0.5)
        self.epochs, self.sampler = EpochState(), ElasticSampler(40, 8)
        self.counts = np.full(3, seed)
        torch.manual_seed(100 * seed + comm.rank)
        parts = {"module": training.model, "optimizer": training.optimizer}
        self.states = [
            TrainState(**parts, scheduler=self.scheduler, **options),
            ModuleState("average", self.average),
            ArrayState("counts", {"n": self.counts}),
            *(RNGState(), self.epochs, self.sampler),
        ]

    def run(self):
        """Take the steps of two epochs; yield the samples of each, and what was drawn."""
        for epoch in remaining_epochs_until(2, self.epochs):
            self.sampler.set_epoch(epoch)
            for batch in self.sampler:
                self.training.step(int(self.counts[0]))
                self.scheduler.step()
                self.counts += 1
                self.follow()
                self.sampler.record_batch()
                yield epoch, batch, torch.randint(99, ()).item()

    @torch.no_grad()
    def follow(self):
        pairs = zip(self.average.parameters(), self.training.net.parameters(), strict=True)
        for mean, now in pairs:
            mean.lerp_(now, 0.25)

    def contents(self):
        mean = replace(self.training, net=self.average)
        rates = [group["lr"] for group in self.training.optimizer.param_groups]
        whole = {"now": whole_tensors(self.training), "mean": whole_tensors(mean)}
        return whole, [*rates, *self.counts]


def assert_equal(found, expected):
    """Require the same tensors by name, bit for bit, and the same of all else."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.equal(expected)
    else:
        assert found == expected


@pytest.mark.parametrize("options", [{}, {"asynchronous": True}], ids=["blocking", "late"])
def test_a_program_goes_on_in_the_middle_of_an_epoch(peers, shared_path, options):
    first = Program(peers, overlap=bool(options))
    with manager(shared_path, *first.states, comm=peers, **options) as ours:
        steps = first.run()
        assert len(list(islice(steps, 7))) == 7
        whole, others = first.contents()
        ours.save(step=7)
        later = list(steps)
    end = first.contents()

    second = Program(peers, seed=1)
    with manager(shared_path, *second.states, comm=peers) as ours:
        assert ours.restore().step == 7
        found, rest = second.contents()
        assert_equal(found, whole)
        assert rest == others
        assert list(second.run()) == later
    assert_equal(second.contents()[0], end[0])
    assert second.contents()[1] == end[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_goes_back_to_its_copy_in_memory(peers, shared_path, kind):
    if kind in ("grid", "hsdp", "stage") and peers.size % 2:
        pytest.skip("cut into halves")
    memory = Memory()
    first = Program(peers, kind=kind)
    options = Options(preemption_signals=(), deadline_seconds=35)
    kept = {"comm": peers, "options": options, "memory": memory}
    with CheckpointManager(shared_path, first.states, **kept) as ours:
        steps = first.run()
        assert len(list(islice(steps, 7))) == 7
        ours.remember(step=7)
        held = first.contents()
        later = list(steps)
    end = first.contents()

    second = Program(peers, seed=1, kind=kind)
    with CheckpointManager(shared_path, second.states, **kept) as ours:
        report = ours.restore()
        assert (report.step, report.from_memory) == (7, True)
        found, rest = second.contents()
        assert_equal(found, held[0])
        assert rest == held[1]
        assert list(second.run()) == later
    if kind in ("ddp", "zero") and peers.size > 2:
        # A new DDP sums in other buckets in its first step: three numbers round otherwise.
        return
    assert_equal(second.contents()[0], end[0])
    assert second.contents()[1] == end[1]


@pytest.mark.parametrize("kind", ["fsdp", "zero"])
def test_parameters_and_averages_of_16_bits(peers, shared_path, kind):
    def make(seed):
        training = KINDS[kind](seed, dtype=torch.bfloat16)
        return training, TrainState(module=training.model, optimizer=training.optimizer)

    first, state = make(0)
    first.step(1)
    with manager(shared_path, state, comm=peers) as ours:
        ours.save()
    second, state = make(1)
    with manager(shared_path, state, comm=peers) as ours:
        noted = clocks_of(ours)
        ours.restore()
    assert noted[0].progress.moved == noted[0].progress.expected > 0
    expected = whole_tensors(first)
    assert {tensor.dtype for tensor in expected.values()} >= {torch.bfloat16}
    assert_equal(whole_tensors(second), expected)


class TestSync:
    def state_of(self, training, **options):
        return TrainState(module=training.model, optimizer=training.optimizer, **options)

    def make(self, peers, kind):
        if peers.size % 2:
            pytest.skip("needs an even number of ranks")
        training = KINDS[kind](0)
        training.step(1)
        return training

    @torch.no_grad()
    def change(self, peers, tensor):
        """Change what the last rank has of a tensor."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if peers.rank == peers.size - 1:
            local.add_(1)

    def test_whole_tensors_beside_cut_ones_are_made_roots(self, peers, shared_path):
        training = self.make(peers, "tp")
        expected = whole_tensors(training)
        self.change(peers, training.net[0].weight)
        with manager(shared_path, self.state_of(training), comm=peers) as ours:
            report = ours.save()
            assert dict(report.sync.differing) == {"train": ("module/0.weight",)}
        assert_equal(whole_tensors(training), expected)

    def test_whole_tensors_beside_cut_ones_are_checked(self, peers, shared_path):
        training = self.make(peers, "tp")
        self.change(peers, training.net[0].weight)
        state = self.state_of(training, sync="check")
        with manager(shared_path, state, comm=peers) as ours:
            with same_error(peers, DivergedError, "module/0.weight"):
                ours.save()
            ours.sync()
            ours.save()

    @pytest.mark.parametrize("sync", ["root", "check"])
    def test_copies_of_a_part_are_compared(self, peers, shared_path, sync):
        training = self.make(peers, "hsdp")
        state = self.state_of(training, sync=sync)
        with manager(shared_path, state, comm=peers) as ours:
            ours.save()
            self.change(peers, training.net[1].weight)
            with same_error(peers, DivergedError, "leaf 'module/1.weight', ["):
                ours.save()


class TestOverlap:
    @pytest.fixture
    def go_on(self, monkeypatch):
        """Holds up the copies made in the background until it is set."""
        go_on, real = threading.Event(), TensorBuffer.copy_to

        def copy_to(buffer, target):
            if threading.current_thread() is not threading.main_thread():
                assert go_on.wait(20)
            real(buffer, target)

        monkeypatch.setattr(TensorBuffer, "copy_to", copy_to)
        return go_on

    def make(self, kind):
        training = KINDS[kind](0)
        training.step(1)
        state = TrainState(
            module=training.model, optimizer=training.optimizer, overlap=True
        )
        return training, state

    @pytest.mark.parametrize("kind", ["fsdp", "zero"])
    def test_a_step_waits_for_the_copy(self, peers, shared_path, go_on, kind):
        reached = []

        def let_go_soon(*_):
            reached.append(go_on.is_set())
            threading.Timer(0.01, go_on.set).start()

        hook = register_optimizer_step_pre_hook(let_go_soon)
        training, state = self.make(kind)
        go_on.clear()
        with manager(shared_path, state, comm=peers, asynchronous=True) as ours:
            expected = whole_tensors(training)
            pending = ours.save()
            training.step(2)
            training.step(3)
            hook.remove()
            pending.wait()
        assert not all(reached)
        again = KINDS[kind](1)
        state = TrainState(module=again.model, optimizer=again.optimizer)
        with manager(shared_path, state, comm=peers) as ours:
            ours.restore()
        assert_equal(whole_tensors(again), expected)

    def test_another_change_of_a_part_spoils_the_save(self, peers, shared_path, go_on):
        training, state = self.make("fsdp")
        with manager(shared_path, state, comm=peers, asynchronous=True) as ours:
            pending = ours.save()
            with torch.no_grad():
                training.net[1].weight.add_(1)
            go_on.set()
            with same_error(peers, StageError, "module/1.weight", "step()"):
                pending.wait()
            assert ours.generations() == []
            assert ours.save().wait().generation == 1
