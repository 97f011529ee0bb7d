# SPDX-License-Identifier: Apache-2.0
"""Goes on in place when ranks are killed: no restart, and no file is read.

::

    mpirun --with-ft ulfm --mca pml ob1 --mca btl self,sm,tcp --mca mtl ^ofi \
        --oversubscribe -n 4 python examples/recover.py --replace --kill 40:2 90:0 150:1,3

kills rank 2 after step 40, then rank 0 after step 90, then two at once. With --replace new
ranks take their places, and losses and weights are those of a run without kills, bit for
bit; without it the rest goes on, with the same global batches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import time
from pathlib import Path

import numpy as np

from mpi_ckpt import ArrayState, CheckpointManager, KeepLast, Options, elastic

SAMPLES, INPUTS, HIDDEN, CLASSES = 4096, 32, 64, 8
GLOBAL_BATCH = 256
RATE, MOMENTUM = 0.1, 0.9


class Network:
    """Two layers, with their velocities; nothing of it but two states knows of saving."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.weights = {
            "first": draw.normal(0, 0.2, (INPUTS, HIDDEN)),
            "second": draw.normal(0, 0.2, (HIDDEN, CLASSES)),
        }
        self.velocities = {name: np.zeros_like(w) for name, w in self.weights.items()}

    def loss_and_gradients(
        self, inputs: np.ndarray, labels: np.ndarray
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Return the summed loss of some samples, and what it changes with."""
        hidden = np.tanh(inputs @ self.weights["first"])
        scores = hidden @ self.weights["second"]
        scores -= scores.max(axis=1, keepdims=True)
        shares = np.exp(scores)
        shares /= shares.sum(axis=1, keepdims=True)
        chosen = np.arange(len(labels)), labels
        loss = -np.log(shares[chosen]).sum()
        shares[chosen] -= 1
        back = (shares @ self.weights["second"].T) * (1 - hidden**2)
        return float(loss), {"first": inputs.T @ back, "second": hidden.T @ shares}

    def update(self, gradients: dict[str, np.ndarray]) -> None:
        """Move the weights, in place."""
        for name, gradient in gradients.items():
            velocity = self.velocities[name]
            velocity *= MOMENTUM
            velocity -= RATE * gradient
            self.weights[name] += velocity

    def digest(self) -> str:
        """Return a fingerprint of the weights, to compare runs by."""
        return hashlib.sha256(
            b"".join(w.tobytes() for w in self.weights.values())
        ).hexdigest()


def make_data(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return samples in groups that lie apart."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(CLASSES, size=SAMPLES)
    return draw.normal(size=(CLASSES, INPUTS))[labels] + draw.normal(
        size=(SAMPLES, INPUTS)
    ), labels


def train(world: elastic.World, args: argparse.Namespace, network: Network) -> str:
    """Train to the end, from wherever the states are; called anew after each loss."""
    inputs, labels = args.data
    ballast = {"zeros": np.zeros(args.ballast << 17)}
    states = [
        ArrayState("weights", network.weights),
        ArrayState("velocities", network.velocities),
        ArrayState("ballast", ballast),
    ]
    options = Options(
        interval=args.interval, retention=KeepLast(2), asynchronous=args.asynchronous
    )
    with CheckpointManager(
        args.checkpoints, states, comm=world.comm, memory=world.memory, options=options
    ) as manager:
        restored = manager.restore()
        if restored is None:
            manager.sync()
        if restored is None or not restored.from_memory:
            # From here on every rank holds a copy: before the first step, as the network
            # outlives a loss just as it is then.
            manager.remember()
        source = "nothing" if restored is None else "files"
        if restored is not None and restored.from_memory:
            source = "memory"
        log(
            args,
            world,
            event="start",
            failures=world.failures,
            lost=world.lost,
            size=world.size,
            step=manager.steps,
            source=source,
        )
        while manager.steps < args.steps:
            step = manager.steps
            # The same samples for any number of ranks; each takes its share.
            batch = np.random.default_rng((args.seed, step)).choice(SAMPLES, GLOBAL_BATCH)
            mine = batch[world.rank :: world.size]
            loss, gradients = network.loss_and_gradients(inputs[mine], labels[mine])
            parts = [np.array([loss]), *(g.ravel() for g in gradients.values())]
            # Summed in the order of the ranks, wherever these are: MPI's own sums may be
            # rounded otherwise once a new rank is on another host.
            shares = np.empty((world.size, sum(part.size for part in parts)))
            world.comm.Allgather(np.concatenate(parts), shares)
            total = shares.sum(axis=0) / GLOBAL_BATCH
            first = total[1 : 1 + INPUTS * HIDDEN].reshape(INPUTS, HIDDEN)
            second = total[1 + INPUTS * HIDDEN :].reshape(HIDDEN, CLASSES)
            network.update({"first": first, "second": second})
            ballast["zeros"][:1] += 1
            # Before it counts as done: from then on it may be done once only.
            log(args, world, event="step", step=step + 1, loss=total[0].hex())
            manager.step()
            time.sleep(args.pace)
            die_if_told(args, world, manager.steps)
        manager.save()
    log(args, world, event="end", step=args.steps, digest=network.digest())
    return network.digest()


def die_if_told(args: argparse.Namespace, world: elastic.World, step: int) -> None:
    """Kill this rank, if it is its turn: the n-th kill comes after n-1 recoveries."""
    if world.failures < len(args.kill):
        when, _, ranks = args.kill[world.failures].partition(":")
        if step == int(when):
            try:
                world.comm.Barrier()  # else the first death keeps others from theirs
            finally:
                if world.rank in map(int, ranks.split(",")):
                    os.kill(os.getpid(), signal.SIGKILL)


def log(args: argparse.Namespace, world: elastic.World, **values: object) -> None:
    """Append a line of JSON at once, on root: the next moment may be the last."""
    if args.log is not None and world.rank == 0:
        with args.log.open("a") as file:
            file.write(json.dumps(values) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--interval", type=int, default=20, help="steps between saves")
    parser.add_argument("--every", type=int, default=5, help="steps between copies")
    parser.add_argument("--replace", action="store_true", help="start new ranks")
    parser.add_argument("--spares", type=int, default=0, help="ranks that wait for a loss")
    parser.add_argument("--asynchronous", action="store_true", help="save behind it")
    parser.add_argument("--max-recoveries", type=int, default=20)
    parser.add_argument("--start-seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds more a step")
    parser.add_argument("--ballast", type=int, default=0, metavar="MIB", help="save more")
    parser.add_argument("--log", type=Path, help="file for events, as JSON lines")
    parser.add_argument(
        "--kill", nargs="*", default=[], metavar="STEP:RANKS", help="ranks to be killed"
    )
    return parser.parse_args()


def main() -> None:
    """Train on all ranks, then on those that are left or new."""
    logging.basicConfig(format="%(message)s")  # root tells of each recovery
    args = parse_arguments()
    args.data = make_data(args.seed)
    # Made once: what is in memory already need not be made again after a loss.
    network = Network(args.seed)
    digest = elastic.run(
        lambda world: train(world, args, network),
        replace=args.replace,
        spares=args.spares,
        memory=elastic.Memory(every=args.every),
        max_recoveries=args.max_recoveries,
        start_seconds=args.start_seconds,
    )
    print(f"weights {digest[:16]}", flush=True)


if __name__ == "__main__":
    main()
