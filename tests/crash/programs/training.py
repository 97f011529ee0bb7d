# SPDX-License-Identifier: Apache-2.0
"""A real training, small: killed and started again, it ends with the same weights.

A perceptron learns from another one, with momentum and with dropout, whose streams differ
between ranks. It is NumPy's, as torch takes longer to import than the training lasts.

Arguments: a directory for everything, number of epochs. How it saves differs from run to
run, and is not to make a difference.

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
    CheckpointManager,
    ElasticSampler,
    EpochState,
    KeepLast,
    Options,
    RNGState,
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


def train(directory: Path, until: int, comm, run: int) -> str:
    """Train to the end; return a digest of what was learned, and of the losses."""
    inputs = np.random.default_rng(1).standard_normal((SAMPLES, INPUTS))
    teacher, model = Perceptron(2), Perceptron(3)
    targets = teacher.hidden(inputs) @ teacher.weights["w2"]
    dropout = np.random.default_rng([4, comm.rank])
    losses = np.zeros(until)
    epochs, sampler = EpochState(), ElasticSampler(SAMPLES, GLOBAL_BATCH, seed=5)
    sums = Accumulator(epochs=epochs)
    arrays = {**model.weights, **model.velocities, "losses": losses}
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
    states += [epochs, sampler, sums]
    with CheckpointManager(directory / "ckpt", states, options=options) as manager:
        manager.restore()
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
                sampler.record_batch()
                manager.step()
                saves.save_every(2)
            learned.wait()
            with sums.synchronized():
                losses[epoch] = sums["loss"]
                sums.clear()
        saves.end()
    ended = [losses, *model.weights.values(), *model.velocities.values()]
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
            learned = train(directory, int(sys.argv[2]), comm, comm.bcast(run))
        if comm.rank == 0:
            (directory / "digest").write_text(learned)
    except BaseException:
        note(directory / "problem", f"rank {comm.rank}: {traceback.format_exc()}")
        raise


if __name__ == "__main__":
    main()
