# SPDX-License-Identifier: Apache-2.0
"""Saves with n ranks, restores with m: any_ranks.py save|restore FOLDER

``save`` is run with 4 ranks and saves with the first 1, 2, 3 and 4 of them. ``restore``
is run with any number and restores each of the four, checking all contents on every rank.
"""

import json
import random
import sys
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
    RNGState,
    State,
    TrainState,
    remaining_epochs_until,
)

LENGTH, BATCH, EPOCH = 103, 12, 2
SIZES = (1, 2, 3, 4)


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
        self.states = [
            TrainState(
                module=self.model, optimizer=self.optimizer, scheduler=self.scheduler
            ),
            *(self.arrays, self.object, self.epochs, self.sums, self.sampler, self.note),
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
        for batch, _ in zip(self.sampler, range(saved_size + 1), strict=False):
            samples += batch
            self.sampler.record_batch()
        return samples

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
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(rank)
        assert manager.save(step=10 * size).size == size
    seen = joined(comm, samples)
    draws = comm.allgather(program.draw())
    if rank == 0:
        (root / "expected.json").write_text(json.dumps({"seen": seen, "draws": draws}))


def restore(comm: MPI.Intracomm, root: Path, saved_size: int) -> None:
    """Restore what ``save`` saved and check every state on every rank."""
    expected = json.loads((root / "expected.json").read_text())
    program = Program(comm)
    manager = CheckpointManager(root, program.states, comm=comm)
    report = manager.restore()
    assert (report.saved_size, report.size) == (saved_size, comm.size)
    assert manager.steps == report.step == 10 * saved_size
    check_streams(comm, program.draw(), expected["draws"])

    trained = Program(comm)
    trained.sampler.bind(SimpleNamespace(rank=0, size=1))  # no manager will
    trained.train(saved_size)
    check_equal(program, trained)
    notes = "+".join(f"rank {rank}" for rank in range(saved_size))
    assert program.note.text == notes

    check_samples(comm, program.sampler, expected["seen"])
    # New sums join the old ones: in the running epoch, as if nothing had happened.
    program.sums["ranks"] += 100
    assert next(remaining_epochs_until(9, program.epochs)) == EPOCH
    with program.sums.synchronized():
        total = saved_size * (saved_size + 1) // 2 + 100 * comm.size
        assert dict(program.sums) == {"ranks": total}

    # What no rank of the saving job had is made the same each time.
    manager.restore()
    again = program.draw()
    manager.restore()
    assert program.draw() == again
    manager.close()


def check_streams(comm: MPI.Intracomm, mine: list, saved: list) -> None:
    if comm.rank < len(saved):
        assert mine == saved[comm.rank], "a random stream did not go on"
    everyone = comm.allgather(mine)
    numbers = [number for one in everyone for number in one]
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
    return [one for part in comm.allgather(mine) for one in part]


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


def main() -> None:
    folder = Path(sys.argv[2])
    world = MPI.COMM_WORLD
    for size in SIZES:
        root = folder / f"by-{size}"
        if sys.argv[1] == "restore":
            restore(world, root, size)
            continue
        part = world.Split(int(world.rank >= size), world.rank)
        if world.rank < size:
            save(part, root)
        part.Free()
    if world.rank == 0:
        print("all as it should be")


if __name__ == "__main__":
    main()
