# SPDX-License-Identifier: Apache-2.0
"""Saves with n ranks, restores with m, and with n again: any_ranks.py FOLDER

Run with an even number of ranks, whose parts are the jobs: as many ranks as it takes make
a communicator of their own, the rest another. For all n and m from 1 to that number what n
ranks saved is restored by m, which check every state on every rank and save it; n ranks
then restore that.
"""

import functools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from mpi4py import MPI

from mpi_ckpt import (
    Accumulator,
    ArrayState,
    CheckpointManager,
    ElasticSampler,
    EpochState,
    ObjectState,
    PerRankState,
    RNGState,
    State,
    TrainState,
)
from tests.uncompiled import leave_out_compiler

leave_out_compiler()

LENGTH, BATCH, EPOCH = 103, 12, 2
MOST = MPI.COMM_WORLD.size
SIZES = range(1, MOST + 1)
FRESH = "not restored"


class Note(State):
    """A plain state: text that the ranks make equal by themselves."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        super().__init__("a note/of mine")
        self.comm, self.text = comm, ""

    def sync(self) -> None:
        self.text = "+".join(self.comm.allgather(self.text))

    def save(self, fileobj) -> None:
        fileobj.write(self.text.encode())

    def load(self, fileobj) -> None:
        self.text = fileobj.read().decode()


def share_out(values: list[list[int]], size: int) -> list[list[int]]:
    """Deal out what all saved ranks had in their bags."""
    everything = [item for value in values for item in value]
    return [everything[rank::size] for rank in range(size)]


class Program:
    """All kinds of states, as a program has them before it restores."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        torch.manual_seed(99)
        self.comm = comm
        self.model = torch.nn.Sequential(
            torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.arrays = ArrayState("arrays", {"table": np.zeros((3, 4), np.int16)})
        self.object = ObjectState("object")
        self.epochs = EpochState()
        self.sums = Accumulator(epochs=self.epochs)
        self.sampler = ElasticSampler(LENGTH, BATCH, seed=5)
        self.generator = np.random.default_rng(1000 + comm.rank)
        self.note = Note(comm)
        self.position = PerRankState("position", FRESH)
        self.bag = PerRankState("bag", resize=share_out)
        self.resized: tuple[int, int] | None = None
        self.states = [
            TrainState(
                module=self.model, optimizer=self.optimizer, scheduler=self.scheduler
            ),
            *(self.arrays, self.object, self.epochs, self.sums, self.sampler, self.note),
            *(self.position, self.bag),
            RNGState(generators={"mine": self.generator}),
        ]

    def train(self, saved_size: int) -> list[int]:
        """Bring all states where they are at the save; return this rank's samples."""
        torch.manual_seed(saved_size)
        for _ in range(3):
            self.model(torch.randn(6, 5)).square().sum().backward()
            self.optimizer.step()
            self.scheduler.step()
        self.arrays.arrays["table"][:] = np.arange(12).reshape(3, 4) - saved_size
        self.object.value = {"by": saved_size, "list": [1, None, "ü"], "x": np.eye(2)}
        self.epochs.finished = EPOCH
        self.sampler.set_epoch(EPOCH)
        samples = []
        for batch, _ in zip(self.sampler, range(1 + saved_size // 2), strict=False):
            samples += batch
            self.sampler.record_batch()
        return samples

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.optimizer.param_groups[0]["lr"]

    def rescale(self, old: int, new: int) -> None:
        """Let the learning rate follow the number of ranks."""
        self.resized = (old, new)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] / old * new
        self.scheduler.base_lrs = [rate / old * new for rate in self.scheduler.base_lrs]

    def draw(self) -> list[float]:
        """Take the next numbers of all streams of this rank."""
        return [
            random.random(),
            np.random.rand(),
            torch.rand((), dtype=torch.float64).item(),
            self.generator.random(),
        ]


def save(comm: MPI.Intracomm, root: Path) -> None:
    """Save all kinds of states with all ranks of a communicator."""
    rank, size = comm.rank, comm.size
    program = Program(comm)
    with CheckpointManager(root, program.states, comm=comm) as manager:
        assert manager.restore() is None
        samples = program.train(size)
        program.note.text = f"rank {rank}"
        program.sums["ranks"] += rank + 1
        program.position.value = {"rank": rank, "cache": np.arange(rank)}
        program.bag.value = [10 * rank, 10 * rank + 1]
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(rank)
        assert manager.save(step=10 * size).size == size
    seen = joined(comm, samples)
    draws = comm.allgather(program.draw())
    if rank == 0:
        (root / "expected.json").write_text(json.dumps({"seen": seen, "draws": draws}))


def restore(comm: MPI.Intracomm, folder: Path, saved_size: int) -> None:
    """Restore what ``save`` saved, check every state on every rank, and save it again."""
    expected = json.loads((folder / f"by-{saved_size}" / "expected.json").read_text())
    program = Program(comm)
    root, again = folder / f"by-{saved_size}", folder / f"by-{saved_size}-{comm.size}"
    with CheckpointManager(root, program.states, comm=comm) as manager:
        report = manager.restore(on_resize=program.rescale)
    assert (report.saved_size, report.size) == (saved_size, comm.size)
    assert manager.steps == report.step == 10 * saved_size
    with CheckpointManager(again, program.states, comm=comm) as manager:
        manager.save(sync=False)
        draws = program.draw()
        check_streams(comm, draws, expected["draws"])
        check_replicated(program, saved_size)
        check_own(comm, program, saved_size)
        check_samples(comm, program.sampler, expected["seen"])
        # New sums join the old ones.
        program.sums["ranks"] += 100
        with program.sums.synchronized(replayed=False):
            total = saved_size * (saved_size + 1) // 2 + 100 * comm.size
            assert dict(program.sums) == {"ranks": total}
    if comm.size == saved_size + 1:
        # What no rank of the saving job had is made the same each time.
        with CheckpointManager(root, program.states, comm=comm) as manager:
            manager.restore()
        assert program.draw() == draws


def return_to(comm: MPI.Intracomm, folder: Path, between: int) -> None:
    """Restore with n what n saved, and other ranks have restored and saved in between."""
    size = comm.size
    expected = json.loads((folder / f"by-{size}" / "expected.json").read_text())
    program = Program(comm)
    with CheckpointManager(
        folder / f"by-{size}-{between}", program.states, comm=comm
    ) as manager:
        manager.restore(on_resize=program.rescale)
        # Streams and values of ranks that there were not in between are gone.
        check_streams(comm, program.draw(), expected["draws"][:between])
        check_replicated(program, size, between)
        check_own(comm, program, min(size, between))
        check_samples(comm, program.sampler, expected["seen"])
        with program.sums.synchronized(replayed=False):
            assert dict(program.sums) == {"ranks": size * (size + 1) // 2}


@functools.cache
def trained_by(saved_size: int) -> Program:
    """Return what so many ranks have saved, as far as it is alike on all."""
    trained = Program(MPI.COMM_SELF)
    trained.sampler.bind(SimpleNamespace(rank=0, size=1))  # no manager will
    trained.train(saved_size)
    return trained


def check_replicated(program: Program, saved_size: int, between: int | None = None) -> None:
    """Require the states that are alike on all ranks to be as they were saved."""
    trained = trained_by(saved_size)
    size = program.comm.size
    last = between or saved_size
    assert program.resized == (None if last == size else (last, size))
    # To the last bit but for a division: / 3 * 3 is not always what it was.
    assert math.isclose(program.rate, trained.rate / saved_size * size)
    for group in program.optimizer.param_groups:
        group["lr"] = trained.rate
    program.scheduler.base_lrs = trained.scheduler.base_lrs
    check_equal(program, trained)
    assert program.note.text == "+".join(f"rank {rank}" for rank in range(saved_size))


def check_own(comm: MPI.Intracomm, program: Program, kept: int) -> None:
    """Require each rank to have its own value, and all that was in bags to be in bags."""
    position = program.position.value
    if comm.rank < kept:
        assert position["rank"] == comm.rank
        assert (position["cache"] == np.arange(comm.rank)).all()
    else:
        assert position == FRESH
    bags = sorted(joined(comm, program.bag.value))
    assert bags == [
        10 * rank + number for rank in range(len(bags) // 2) for number in (0, 1)
    ]


def check_streams(comm: MPI.Intracomm, mine: list, saved: list) -> None:
    if comm.rank < len(saved):
        assert mine == saved[comm.rank], "a random stream did not go on"
    everyone = comm.allgather(mine)
    numbers = [number for stream in everyone for number in stream]
    assert len(set(numbers)) == len(numbers), f"ranks share a stream: {everyone}"


def check_equal(found: Program, expected: Program) -> None:
    for name in ("model", "optimizer", "scheduler"):
        a, b = (getattr(program, name).state_dict() for program in (found, expected))
        assert flat(a) == flat(b), name
    assert found.optimizer.state_dict()["state"][0]["step"] == 3
    assert (found.arrays.arrays["table"] == expected.arrays.arrays["table"]).all()
    assert flat(found.object.value) == flat(expected.object.value)
    assert found.epochs.finished == EPOCH
    ours = (found.sampler.epoch, found.sampler.consumed)
    assert ours == (EPOCH, expected.sampler.consumed)


def check_samples(comm: MPI.Intracomm, sampler: ElasticSampler, seen: list) -> None:
    sampler.set_epoch(EPOCH)  # as a resumed loop does; the position stays
    rest = joined(comm, [i for batch in sampler for i in batch])
    assert seen
    assert rest
    assert sorted(seen + rest) == list(range(LENGTH)), "not every sample exactly once"


def joined(comm: MPI.Intracomm, mine: list) -> list:
    return [item for part in comm.allgather(mine) for item in part]


def flat(value: object) -> object:
    """Make nested values comparable, tensors and arrays by their bytes."""
    if isinstance(value, dict):
        return {str(key): flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.asarray(value)
        return (str(array.dtype), array.shape, array.tobytes())
    return value


@contextmanager
def jobs_of(world: MPI.Intracomm, size: int) -> Iterator[MPI.Intracomm]:
    """Make two jobs of all ranks, the first of so many; wait for both at the end."""
    part = world.Split(int(world.rank >= size), world.rank)
    yield part
    part.Free()
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.005)  # not on the cores of those that are not done


def main() -> None:
    world, folder = MPI.COMM_WORLD, Path(sys.argv[1])
    # Of 8: 8 and none, 7 and 1, 6 and 2, 5 and 3, 4 and 4: the latter do the same, once.
    layouts = range(MOST, MOST // 2 - 1, -1)
    idle = world.rank >= MOST // 2
    for size in layouts:
        with jobs_of(world, size) as part:
            if size > MOST // 2 or not idle:
                save(part, folder / f"by-{part.size}")
    for size in layouts:
        with jobs_of(world, size) as part:
            for saved_size in SIZES:
                if size > MOST // 2 or idle == (saved_size > MOST // 2):
                    restore(part, folder, saved_size)
    for size in layouts:
        with jobs_of(world, size) as part:
            for between in SIZES:
                if size > MOST // 2 or idle == (between > MOST // 2):
                    return_to(part, folder, between)
    if world.rank == 0:
        print("all as it should be")


if __name__ == "__main__":
    main()
