# SPDX-License-Identifier: Apache-2.0
"""A real training, small: killed and started again, it ends with the same weights.

A perceptron learns from another one, with momentum and with dropout, whose streams differ
between ranks. It is NumPy's, as torch takes longer to import than the training lasts.

Arguments: a directory for everything, number of epochs, "cut" if each rank saves its rows
of the velocities, and the samples that it has seen. How it saves differs from run to run,
and is not to make a difference.

In the directory: ``ckpt`` the checkpoints; ``started`` the step at which each run began;
``acked`` the steps whose save returned; ``digest`` of the weights and losses at the end;
``shared`` files of shared memory to be removed; ``problem`` what should not be.
"""

import hashlib
import os
import sys
import traceback
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_ckpt import (
    Accumulator,
    Block,
    CheckpointManager,
    ConcatState,
    ElasticSampler,
    EpochState,
    KeepLast,
    Options,
    RNGState,
    ShardedArrayState,
    remaining_epochs_until,
)
from mpi_ckpt.errors import CollectiveError
from mpi_ckpt.options import IO
from tests.crash.faults import quiet
from tests.crash.programs.saver import last_line, note
from tests.crash.world import Arrays
from tests.launch import shared_memory

SAMPLES, GLOBAL_BATCH = 240, 16
INPUTS, HIDDEN, OUTPUTS = 16, 32, 4
DROPPED = 0.2
RATE, MOMENTUM = 0.002, 0.9


class Perceptron:
    """Two layers, and the velocities of their weights."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed).standard_normal
        shapes = {"w1": (INPUTS, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, OUTPUTS)}
        self.weights = {name: draw(shape) / 4 for name, shape in shapes.items()}
        self.velocities = {f"v_{n}": np.zeros_like(w) for n, w in self.weights.items()}

    def hidden(self, inputs):
        return np.tanh(inputs @ self.weights["w1"] + self.weights["b1"])

    def gradients(self, inputs, targets, dropout):
        """Return the summed loss and gradient of this rank's samples."""
        hidden = self.hidden(inputs)
        mask = dropout.random(hidden.shape) >= DROPPED
        error = (hidden * mask) @ self.weights["w2"] - targets
        inner = (error @ self.weights["w2"].T) * mask * (1 - hidden**2)
        parts = [inputs.T @ inner, inner.sum(0), (hidden * mask).T @ error]
        return (error**2).sum() / 2, np.concatenate([part.ravel() for part in parts])

    def step(self, gradient):
        at = 0
        for name, weights in self.weights.items():
            velocity = self.velocities[f"v_{name}"]
            part = gradient[at : at + weights.size].reshape(weights.shape)
            velocity[:] = MOMENTUM * velocity - RATE * part
            weights += velocity
            at += weights.size


class Cut:
    """What each rank saves a part of: the velocities, and a row for each sample seen."""

    def __init__(self, model: Perceptron, comm) -> None:
        self._comm = comm
        self._own: dict[str, np.ndarray] = {}
        blocks = {}
        for name, whole in model.velocities.items():
            first = len(whole) * comm.rank // comm.size
            end = len(whole) * (comm.rank + 1) // comm.size
            self._own[name] = whole[first:end]
            offset = (first, *[0] * (whole.ndim - 1))
            blocks[name] = Block(self._own[name], shape=whole.shape, offset=offset)
        nothing = np.empty(0, np.int64)
        self._seen = ConcatState("seen", {"step": nothing, "sample": nothing})
        self._model = model
        self.states = [ShardedArrayState("velocities", blocks), self._seen]

    def complete(self) -> None:
        """Get the rows of the other ranks, after a restore."""
        for name, own in self._own.items():
            rows = np.concatenate(all_of(self._comm, own.copy()))
            self._model.velocities[name][:] = rows

    def note(self, step: int, batch: list[int]) -> None:
        new = {"step": np.full(len(batch), step), "sample": np.array(batch, np.int64)}
        self._seen.arrays = {
            name: np.concatenate([column, new[name]])
            for name, column in self._seen.arrays.items()
        }

    def rows(self) -> np.ndarray:
        """Return all rows of all ranks, in an order of their own."""
        mine = np.stack([self._seen.arrays["step"], self._seen.arrays["sample"]], 1)
        every = np.concatenate(all_of(self._comm, mine))
        return every[np.lexsort(every.T)]


def train(directory: Path, until: int, comm, run: int, *, is_cut: bool) -> str:
    """Train to the end; return a digest of what was learned, and of the losses."""
    inputs = np.random.default_rng(1).standard_normal((SAMPLES, INPUTS))
    teacher, model = Perceptron(2), Perceptron(3)
    targets = teacher.hidden(inputs) @ teacher.weights["w2"]
    dropout = np.random.default_rng([4, comm.rank])
    losses = np.zeros(until)
    epochs, sampler = EpochState(), ElasticSampler(SAMPLES, GLOBAL_BATCH, seed=5)
    sums = Accumulator(epochs=epochs)
    cut = Cut(model, comm) if is_cut else None
    arrays = {**model.weights, "losses": losses}
    arrays |= {} if cut else model.velocities
    learned = Arrays("model", arrays, overlap=run % 5 > 2)
    states = [learned, RNGState(generators={"dropout": dropout})]
    options = Options(
        retention=KeepLast(2),
        preemption_signals=(),
        deadline_seconds=60,
        asynchronous=run % 2 == 1,
        io=IO(reuse=run % 3 > 0),
        writers="all" if run % 4 > 1 else "root",
    )
    states += [epochs, sampler, sums, *(cut.states if cut else [])]
    with CheckpointManager(directory / "ckpt", states, options=options) as manager:
        if manager.restore() and cut:
            cut.complete()
        begin(directory, manager)
        saves = Saves(directory, manager)
        for epoch in remaining_epochs_until(until, epochs):
            sampler.set_epoch(epoch)
            for batch in sampler:
                loss, gradient = model.gradients(inputs[batch], targets[batch], dropout)
                sums["loss"] += loss
                # In the order of the ranks, whatever the MPI library makes of a sum.
                total = sum(all_of(comm, gradient))
                learned.wait()
                model.step(total)
                if cut:
                    cut.note(manager.steps, batch)
                sampler.record_batch()
                manager.step()
                saves.save_every(2)
            learned.wait()
            with sums.synchronized():
                losses[epoch] = sums["loss"]
                sums.clear()
        saves.end()
        seen = [cut.rows()] if cut else []
    ended = [*seen, losses, *model.weights.values(), *model.velocities.values()]
    return hashlib.sha256(b"".join(array.tobytes() for array in ended)).hexdigest()


def all_of(comm, part):
    """Gather what all ranks have; fail as the package does if a rank is lost meanwhile."""
    try:
        return comm.allgather(part)
    except MPI.Exception as error:
        raise CollectiveError(f"allgather: MPI failed: {error}") from error


def begin(directory: Path, manager: CheckpointManager) -> None:
    """Note where this run goes on; refuse to have lost anything."""
    if manager.is_root:
        acked = last_line(directory / "acked")
        if manager.steps < acked:
            raise AssertionError(f"LOST: step {manager.steps} after {acked} was acked")
        note(directory / "started", manager.steps)


class Saves:
    """Saves now and then, and notes what was acknowledged."""

    def __init__(self, directory: Path, manager: CheckpointManager) -> None:
        self._directory, self._manager = directory, manager
        self._pending = None

    def save_every(self, steps: int) -> None:
        if self._manager.steps % steps == 0:
            self.end()
            self._pending = self._manager.save()

    def end(self) -> None:
        """Wait for what is pending."""
        pending, self._pending = self._pending, None
        if pending is not None:
            report = pending.wait()
            if self._manager.is_root:
                note(self._directory / "acked", report.step)


def main() -> None:
    directory, comm = Path(sys.argv[1]), MPI.COMM_WORLD
    try:
        for path in shared_memory(os.getpid()):  # MPI's, which a killed rank cannot remove
            note(directory / "shared", path)
        started = directory / "started"
        run = len(started.read_text().split()) if comm.rank == 0 and started.exists() else 0
        with quiet():
            epochs, is_cut = int(sys.argv[2]), "cut" in sys.argv[3:]
            learned = train(directory, epochs, comm, comm.bcast(run), is_cut=is_cut)
        if comm.rank == 0:
            (directory / "digest").write_text(learned)
    except BaseException:
        note(directory / "problem", f"rank {comm.rank}: {traceback.format_exc()}")
        raise


if __name__ == "__main__":
    main()
