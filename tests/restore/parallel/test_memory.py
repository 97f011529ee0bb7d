# SPDX-License-Identifier: Apache-2.0
"""Copies in memory: what a save or `remember` leaves there, and a restore from it."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpi_ckpt import (
    Accumulator,
    ArrayState,
    CheckpointManager,
    ObjectState,
    Options,
    PerRankState,
    RNGState,
    State,
    TrainState,
)
from mpi_ckpt.comm.presence import Presence
from mpi_ckpt.elastic import Memory
from mpi_ckpt.engine.restore.from_memory import LentCopy
from mpi_ckpt.errors import OptionsError, StageError, StateMismatchError
from mpi_ckpt.storage.format.layout import generation_name
from tests.ranks import assert_same, same_error


class Words(State):
    def __init__(self, text):
        super().__init__("words")
        self.text = text

    def save(self, fileobj):
        fileobj.write(self.text)

    def load(self, fileobj):
        self.text = fileobj.read()


class Program:
    """Something of every kind of state."""

    def __init__(self, rank, seed=0):
        torch.manual_seed(seed)
        module = torch.nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        self.module, self.optimizer = module, optimizer
        self.array = np.arange(50.0) + seed
        self.rank = rank
        self.stream = random.Random(100 * seed + rank)
        self.train = TrainState(module=module, optimizer=optimizer)
        self.counters = ObjectState("counters", {"epoch": seed, "history": [seed]})
        self.own = PerRankState("own", value={"rank": rank, "seed": seed})
        self.words = Words(b"%d" % seed)
        self.sums = Accumulator(name="sums")

    @property
    def states(self):
        return [
            self.train,
            ArrayState("array", {"x": self.array}),
            self.counters,
            RNGState(generators={"mine": self.stream}),
            self.own,
            self.words,
            self.sums,
        ]

    def step(self):
        self.module(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()

    def change(self):
        """Change everything in place."""
        self.step()
        self.array *= -1
        self.counters.value["epoch"] += 1
        self.counters.value["history"].append("later")
        self.stream.random()
        self.own.value["seed"] = -1
        self.words.text = b"later"
        self.sums["seen"] += 1

    def seen(self):
        return {
            "weights": [p.detach().numpy().tobytes() for p in self.module.parameters()],
            "moments": str(self.optimizer.state_dict()["state"]),
            "array": self.array.tobytes(),
            "counters": repr(self.counters.value),
            "stream": self.stream.getstate(),
            "own": dict(self.own.value),
            "words": self.words.text,
        }


def make(path, program, comm, memory, **options):
    return CheckpointManager(
        path,
        program.states,
        comm=comm,
        options=Options(preemption_signals=(), deadline_seconds=35, **options),
        memory=memory,
    )


HOLDERS = pytest.mark.parametrize("holders", ["all", "root"])


@HOLDERS
def test_a_restore_undoes_what_was_changed_in_place(comm, shared_path, holders):
    memory = Memory(holders)
    program = Program(comm.rank)
    program.step()
    with make(shared_path, program, comm, memory) as manager:
        manager.remember(step=5)
        assert memory.step == (5 if holders == "all" or comm.rank == 0 else None)
        before = program.seen()
        weights = list(program.module.parameters())
        for _ in range(2):
            program.change()
            assert program.seen() != before
            report = manager.restore()
            assert program.seen() == before
        # In place: what a program has taken hold of is still what it trains.
        assert [id(param) for param in program.module.parameters()] == [*map(id, weights)]
        assert (report.from_memory, report.generation, report.step) == (True, 0, 5)
        assert (manager.steps, report.size, report.saved_size) == (5, comm.size, comm.size)
        assert manager.generations() == []


@HOLDERS
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_leaves_a_copy(comm, shared_path, holders, asynchronous):
    memory = Memory(holders)
    program = Program(comm.rank)
    with make(shared_path, program, comm, memory, asynchronous=asynchronous) as manager:
        report = manager.save(step=3, metrics={"loss": 0.5})
        before = program.seen()
        program.change()
        assert report.wait().generation == 1
        found = manager.restore()
        assert found.from_memory
        assert found.metrics == {"loss": 0.5}
        assert program.seen() == before
    # And the generation holds the same.
    later = Program(comm.rank, seed=8)
    with make(shared_path, later, comm, None) as manager:
        assert not manager.restore().from_memory
        assert later.seen() == before


def test_copies_behind_a_gate_are_taken_over_when_made(comm, shared_path):
    memory = Memory("all")
    module = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    state = TrainState(module=module, optimizer=optimizer, overlap=True)
    with CheckpointManager(
        shared_path,
        [state],
        comm=comm,
        options=Options(asynchronous=True, preemption_signals=()),
        memory=memory,
    ) as manager:
        manager.save(step=1)
        before = module.weight.detach().clone()
        module(torch.ones(3)).sum().backward()
        optimizer.step()
        assert not torch.equal(module.weight, before)
        assert manager.restore().from_memory
        assert torch.equal(module.weight, before)


def test_a_rank_without_a_copy_is_sent_roots(comm, shared_path):
    memory = Memory("all")
    program = Program(comm.rank, seed=comm.rank)
    with make(shared_path, program, comm, memory) as manager:
        manager.sync()
        manager.remember(step=2)
        roots = program.seen()
    if comm.rank == comm.size - 1 and comm.size > 1:
        memory = Memory("all")  # of a process that has just been started
    later = Program(comm.rank, seed=50 + comm.rank)
    with make(shared_path, later, comm, memory) as manager:
        assert manager.restore().from_memory
        # Root's, as in a generation, of a state that does not sync itself.
        assert later.seen() == {**roots, "words": b"0"}


@pytest.mark.parametrize("lent", [True, False])
def test_a_rank_that_was_given_roots_copy_holds_it_from_then_on(comm, shared_path, lent):
    memory = Memory("all")
    if lent:
        memory.lend()
    program = Program(comm.rank, seed=comm.rank)
    with make(shared_path, program, comm, memory) as manager:
        manager.sync()
        program.sums["seen"] += 1
        manager.remember(step=2)
        roots = program.seen()
    is_new = comm.rank == comm.size - 1 and comm.size > 1
    if is_new:
        memory = Memory("all")
    later = Program(comm.rank, seed=50)
    with make(shared_path, later, comm, memory) as manager:
        manager.restore()
        assert memory.step == 2
        # What is mapped needs no memory of its own.
        assert (memory.arena.nbytes == 0) == (is_new and lent)
        later.change()
        if not is_new and comm.size > 1:
            memory.clear()
            memory.arena.close()
    # All others are lost, and the new rank is the only one to know.
    order = comm.Split(0, comm.size - comm.rank)
    last = Program(order.rank, seed=70)
    with make(shared_path, last, order, memory) as manager:
        assert manager.restore().from_memory
        with last.sums.synchronized():
            assert last.sums["seen"] == comm.size
        found = last.seen()
        for name in ("weights", "moments", "array", "counters"):
            assert found[name] == roots[name], name
    order.Free()


def test_a_copy_that_was_lent_gives_way_to_the_next_one(comm, shared_path):
    memory = Memory("all")
    memory.lend()
    program = Program(comm.rank)
    with make(shared_path, program, comm, memory) as manager:
        manager.remember(step=2)
        if comm.rank > 0:
            memory = Memory("all")
    later = Program(comm.rank)
    with make(shared_path, later, comm, memory) as manager:
        manager.restore()
        later.change()
        manager.remember(step=3)
        before = later.seen()
        later.change()
        manager.restore()
        assert memory.step == 3
        assert later.seen() == before


def test_other_memory_is_not_taken_for_the_lent_one():
    memory = Memory("all")
    memory.lend()
    memory.arena.take(5000)[:3] = b"abc"
    shared = memory.arena.shared
    assert shared.view[:3] == b"abc"
    offer = LentCopy(
        shared.descriptor, shared.inode, shared.view.nbytes, (0, -1, 1), (2, 1, 2), b"x"
    )
    assert LentCopy.decode(offer.encode()) == offer
    assert LentCopy.decode(b"null") is None

    alone = SimpleNamespace(root=0, visible={0: Presence.own()})
    assert [*map(bytes, offer.take(alone))] == [b"ab", b"x", b"bc"]
    assert replace(offer, inode=offer.inode + 1).take(alone) is None
    assert replace(offer, nbytes=1 << 40).take(alone) is None
    alone.visible = {}
    assert offer.take(alone) is None


@pytest.mark.parametrize("holders", ["root", "all"])
def test_a_rank_without_memory_for_a_copy_goes_on_without(
    comm, shared_path, holders, monkeypatch, caplog
):
    if comm.size == 1:
        pytest.skip("root holds the copy")
    memory = Memory(holders)
    program = Program(comm.rank)
    with make(shared_path, program, comm, memory) as manager:
        manager.remember(step=2)
        before = program.seen()
        program.change()
        if comm.rank > 0:
            memory.clear()

        def none_left(_):
            raise OSError(12, "Cannot allocate memory")

        if comm.rank == 1:
            monkeypatch.setattr(memory.arena, "take", none_left)
        assert manager.restore().from_memory
        assert {**program.seen(), "own": before["own"]} == before
        holds = comm.rank == 0 or (holders == "all" and comm.rank > 1)
        assert memory.step == (2 if holds else None)
    said = "holds none until the next save" in caplog.text
    assert said == (comm.rank == 1 and holders == "all")


def test_fewer_ranks_go_on_from_memory(comm, shared_path):
    memory = Memory("all")
    program = Program(comm.rank)
    with make(shared_path, program, comm, memory) as manager:
        program.sums["seen"] += 1
        manager.remember(step=4)
        before = program.seen()
    # The last become the first, as when root is lost.
    stays = comm.rank > 0 or comm.size == 1
    fewer = comm.Split(0 if stays else 1, comm.size - comm.rank)
    if stays:
        later = Program(fewer.rank, seed=9)
        with make(shared_path, later, fewer, memory) as manager:
            report = manager.restore()
            assert report.from_memory
            assert (report.saved_size, report.size) == (comm.size, fewer.size)
            with later.sums.synchronized():
                assert later.sums["seen"] == comm.size
        found = later.seen()
        for name in ("weights", "moments", "array", "counters", "words"):
            assert found[name] == before[name], name
    fewer.Free()


def test_without_a_copy_on_root_the_newest_generation_is_restored(comm, shared_path):
    memory = Memory("all")
    program = Program(comm.rank)
    with make(shared_path, program, comm, memory) as manager:
        assert manager.restore() is None
        manager.save(step=6)
        before = program.seen()
        program.change()
        if comm.rank == 0:
            memory.clear()
        report = manager.restore()
        assert (report.from_memory, report.generation) == (False, 1)
        assert program.seen() == before
        # What others held is of before that, and nobody goes back to it.
        assert memory.step is None


def test_steps_make_copies_as_often_as_told(comm, shared_path):
    memory = Memory("all", every=3)
    program = Program(comm.rank)
    held = []
    with make(shared_path, program, comm, memory, interval=5) as manager:
        for _ in range(7):
            manager.step()
            held.append(memory.step)
    assert held == [None, None, 3, 3, 5, 6, 6]


def test_a_save_of_some_states_leaves_no_copy(comm, shared_path):
    memory = Memory("all")
    program = Program(comm.rank)
    with make(shared_path, program, comm, memory) as manager:
        manager.save()
        manager.save(only=["array"])
        assert memory.step is None
        assert not manager.restore().from_memory


def test_a_copy_that_fails_on_one_rank_is_told_to_all(comm, shared_path, monkeypatch):
    memory = Memory("all")
    program = Program(comm.rank)
    last = comm.size - 1
    with make(shared_path, program, comm, memory) as manager:
        manager.remember(step=1)

        def none_left(_):
            raise StageError("no memory to stage a save")

        if comm.rank == last:
            monkeypatch.setattr(memory.arena, "take", none_left)
        with same_error(comm, StageError, f"rank {last}", "no memory to stage"):
            manager.remember(step=2)
        assert memory.step == (None if comm.rank == last else 2)
        monkeypatch.undo()
        manager.remember(step=3)
        assert memory.step == 3


def test_a_program_of_another_form_is_refused(comm, shared_path):
    memory = Memory("all")
    with CheckpointManager(
        shared_path, [ArrayState("a", {"x": np.ones(3)})], comm=comm, memory=memory
    ) as manager:
        manager.remember()
    for state, part in (
        (ArrayState("b", {"x": np.ones(3)}), "'a' is saved, not in the program"),
        (ArrayState("a", {"x": np.ones(4)}), "the copy in memory does not fit"),
    ):
        with (
            CheckpointManager(shared_path, [state], comm=comm, memory=memory) as manager,
            same_error(comm, StateMismatchError, part),
        ):
            manager.restore()


def test_several_writers_write_from_the_copies(comm, shared_path):
    memory = Memory("all")
    program = Program(comm.rank)
    with make(
        shared_path, program, comm, memory, writers="all", asynchronous=True
    ) as checkpoints:
        pending = checkpoints.save(step=1)
        before = program.seen()
        program.change()
        pending.wait()
        assert checkpoints.restore().from_memory
        assert program.seen() == before
    later = Program(comm.rank, seed=3)
    with make(shared_path, later, comm, None) as manager:
        manager.restore()
        assert later.seen() == before


def test_ranks_must_have_the_same_memory(comm, shared_path):
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    memory = Memory("all") if comm.rank == 0 else None
    with same_error(comm, OptionsError, "memory=Memory('all'", "memory=None"):
        make(shared_path, Program(comm.rank), comm, memory)


def test_remember_without_a_memory_is_refused(comm, shared_path):
    with (
        make(shared_path, Program(comm.rank), comm, None) as manager,
        same_error(comm, OptionsError, "was given a Memory"),
    ):
        manager.remember()


def test_a_restore_of_some_states_is_from_files(comm, shared_path):
    memory = Memory("all")
    program = Program(comm.rank)
    with make(shared_path, program, comm, memory) as manager:
        manager.save(step=1)
        program.array[:] = 7
        manager.remember(step=2)
        report = manager.restore(only=["array"])
        assert not report.from_memory
        assert (program.array == np.arange(50.0)).all()
        assert_same(comm, report.step)
        assert report.path.name == generation_name(1)
