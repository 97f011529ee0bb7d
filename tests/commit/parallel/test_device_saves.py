# SPDX-License-Identifier: Apache-2.0
"""Saves and restores of tensors on a device, against a stand-in that works late."""

import threading

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from mpi_ckpt import (
    Block,
    CheckpointManager,
    ObjectState,
    Options,
    ShardedArrayState,
    TrainState,
)
from mpi_ckpt.engine.sync import replicas
from mpi_ckpt.errors import StageError
from mpi_ckpt.memory import Memory
from mpi_ckpt.options import IO
from mpi_ckpt.storage.reading.reader import GenerationReader
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


def large_state(device, count=200_000):
    """Two leaves on the device, and one of the host."""
    torch.manual_seed(5)
    values = {name: device.tensor(torch.rand(count)) for name in ("a", "b")}
    return ObjectState("big", {**values, "on host": torch.rand(10)}, sync="root")


def test_equal_replicas_are_compared_without_a_copy_to_the_host(comm, shared_path, device):
    state = large_state(device)
    with manager(shared_path, state, comm=comm) as mine:
        report = mine.sync()
    assert not report.differing
    assert device.copied == {"to host": 0, "to device": 0}


def test_only_what_differs_is_copied(comm, shared_path, device):
    state = large_state(device)
    expected = state.value["b"].clone()
    state.value["b"][1234] += comm.rank
    with manager(shared_path, state, comm=comm) as mine:
        report = mine.sync()
    assert torch.equal(state.value["b"], expected)
    if comm.size > 1:
        assert report.differing == {"big": ("b",)}
        way = "to host" if comm.rank == 0 else "to device"
        assert device.copied[way] == 800_000
        assert sum(device.copied.values()) == 800_000


@pytest.mark.parametrize("options", [{}, LATER])
def test_a_rank_that_writes_nothing_copies_nothing(comm, shared_path, device, options):
    state = large_state(device)
    expected = state.value["a"].clone()
    with manager(shared_path, state, comm=comm, **options) as mine:
        for _ in range(3):
            mine.save()
            mine.wait()
        assert (device.copied["to host"] == 0) == (comm.rank != 0)
        state.value["a"].zero_()
        mine.restore()
    assert torch.equal(state.value["a"], expected)


def test_an_unchanged_leaf_is_shared_without_a_copy(comm, shared_path, device):
    state = large_state(device)
    with manager(shared_path, state, comm=comm) as mine:
        mine.save()
        device.copied["to host"] = 0
        state.value["b"].add_(1)
        report = mine.save()
        assert report.bytes_reused == 800_000 + 40
        # The changed one is copied once, where it is written.
        assert device.copied["to host"] == (800_000 if comm.rank == 0 else 0)
        again = mine.save()
        assert again.bytes_reused == 1_600_000 + 40
        assert device.copied["to host"] == (800_000 if comm.rank == 0 else 0)
        expected = {name: one.clone() for name, one in state.value.items()}
        for one in state.value.values():
            one.zero_()
        mine.restore()
    assert all(torch.equal(state.value[name], one) for name, one in expected.items())
    assert GenerationReader(report.path).manifest.generation == 2


def test_a_copy_in_the_background_shares_what_is_unchanged(comm, shared_path, device):
    state = large_state(device)
    with manager(shared_path, state, comm=comm, **LATER) as mine:
        mine.save()
        state.value["b"].add_(1)
        mine.save()
        mine.wait()
        report = mine.last_save
        expected = state.value["b"].clone()
        state.value["b"].zero_()
        mine.restore()
    assert report.bytes_reused == 800_000 + 40
    assert torch.equal(state.value["b"], expected)


def test_what_another_run_has_saved_is_shared_by_digest(comm, shared_path, device):
    state = large_state(device)
    with manager(shared_path, state, comm=comm) as mine:
        mine.save()
    with manager(shared_path, state, comm=comm) as mine:
        mine.restore()
        device.copied["to host"] = 0
        report = mine.save()
    assert report.bytes_reused == 1_600_000 + 40
    assert device.copied["to host"] == (1_600_000 if comm.rank == 0 else 0)


@pytest.mark.parametrize("way", ["sync", "save", "save later"])
@pytest.mark.parametrize("cause", ["on the host", "no memory"])
def test_digests_are_compared_where_a_rank_has_no_fingerprints(
    comm, shared_path, device, cause, way
):
    """And not fingerprints with digests, which always differ."""
    state = large_state(device)
    if comm.rank == comm.size - 1 and cause == "on the host":
        state.value = {name: one.clone() for name, one in state.value.items()}
    if comm.rank == comm.size - 1 and cause == "no memory":
        device.has_memory = False
    options = LATER if way == "save later" else {}
    with manager(shared_path, state, comm=comm, **options) as mine:
        for bit in (0, 1):
            state.value["a"].view(torch.int32)[7] ^= bit * (comm.rank == comm.size - 1)
            report = mine.sync() if way == "sync" else mine.save()
            mine.wait()
            report = report if way == "sync" else mine.last_save.sync
            is_seen = bool(bit) and comm.size > 1
            assert report.differing == ({"big": ("a",)} if is_seen else {})


def test_averages_of_leaves_on_devices(comm, shared_path, device):
    state = large_state(device)
    state.sync_mode = "mean"
    state.value["a"].fill_(comm.rank)
    with manager(shared_path, state, comm=comm) as mine:
        mine.save()
        state.value["a"].zero_()
        mine.restore()
        assert torch.all(state.value["a"] == (comm.size - 1) / 2)
        state.value["a"].fill_(comm.rank)
        mine.sync()
    assert torch.all(state.value["a"] == (comm.size - 1) / 2)


def test_state_cut_over_ranks_comes_from_devices_and_goes_there(comm, shared_path, device):
    rows, ghosts = 50 + comm.rank, ((1, 2), (3, 0))
    padded = device.tensor(torch.rand(rows + 3, 703, dtype=torch.float64))
    block = Block.rows(padded, comm, ghosts=ghosts)
    expected = padded[1:-2, 3:].clone()
    with manager(shared_path, ShardedArrayState("field", {"x": block}), comm=comm) as mine:
        device.work(lambda: padded.neg_())
        report = mine.save()
        device.copied["to device"] = 0
        padded.zero_()
        mine.restore()
    assert torch.equal(padded[1:-2, 3:], -expected)
    assert device.copied["to device"] >= expected.nbytes
    assert report.generation == 1
    assert sum(device.pinned.values()) <= 8 * CHUNK  # halves, and no copy of the field


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
