# SPDX-License-Identifier: Apache-2.0
"""What every case gets: ranks, a directory, the state; and the ways to make managers."""

from __future__ import annotations

import shutil
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import ceilings, names
from mpi_ckpt import ArrayState, CheckpointManager, KeepLast, Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from mpi4py import MPI

    from benchmarks.harness import Contender
    from mpi_ckpt import Local, State
    from mpi_ckpt.elastic import Memory

__all__ = ["Arguments", "Arrays", "Setting", "sleep_until_all_come", "touch_arrays"]

Arrays = dict[str, np.ndarray]

_SLEEP_SECONDS = 0.001
# Of each shape of a raw transfer: the fastest one is then measured beside all others.
_SHAPE_TURNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What the command line says that a case wants to know.

    Attributes:
        sweep: Whether ``sync`` goes through sizes as well.
        largest: Largest size of that sweep in bytes.
        leaves: How many leaves ``small`` has.
        parameters: How many parameters the model of ``train`` has.
        steps: How many steps ``train`` takes.
        smoke: Tiny: only that it runs.
    """

    sweep: bool = False
    largest: int = 1 << 30
    leaves: int = 20_000
    parameters: int = 20_000_000
    steps: int = 30
    smoke: bool = False


@dataclass(slots=True)
class Setting:
    """Where and on what a case runs.

    Attributes:
        comm: The ranks.
        directory: Empty at the start, the same on every rank, gone after the case.
        state: The arrays to save, equal on all ranks.
        arguments: What the command line says.
        stack: What is to be closed after the case, on every rank in the same order.
    """

    comm: MPI.Intracomm
    directory: Path
    state: Arrays
    arguments: Arguments
    stack: ExitStack = field(default_factory=ExitStack)
    _turns: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(array.nbytes for array in self.state.values())

    @property
    def is_root(self) -> bool:
        """Whether this is the rank that writes alone."""
        return self.comm.rank == 0

    def manager(
        self,
        name: str,
        states: Sequence[State] | None = None,
        *,
        is_fresh: bool = True,
        memory: Memory | None = None,
        local: Local | None = None,
        **options: object,
    ) -> CheckpointManager:
        """Make a manager, closed after the case at the latest. Collective.

        Args:
            name: Of its directory.
            states: What it saves; None for the arrays of this setting.
            is_fresh: Whether to remove what is in the directory.
            memory: What it keeps copies in, if anything.
            local: Where hosts keep saves; None for nowhere.
            options: Fields of `Options`.
        """
        root = self.directory / name
        if is_fresh:
            self.on_root(lambda: shutil.rmtree(root, ignore_errors=True))()
        chosen: dict[str, Any] = {
            "retention": KeepLast(1),
            "preemption_signals": (),
            **options,
        }
        manager = CheckpointManager(
            root,
            [ArrayState("adam", self.state, sync="root")] if states is None else states,
            comm=self.comm,
            options=Options(**chosen),
            memory=memory,
            local=local,
        )
        return self.stack.enter_context(manager)

    def on_root(self, act: Callable[[], object]) -> Callable[[], None]:
        """Return a function that acts on root and waits for root on every rank."""

        def run() -> None:
            if self.is_root:
                act()
            self.comm.Barrier()

        return run

    def fastest(self, name: str, transfer: Callable[[int, int], Contender]) -> Contender:
        """Return a raw limit with the fastest of `names.RAW_SHAPES`. Collective.

        Args:
            name: Of the limit; the shape comes to it.
            transfer: Returns it with so many MiB a block, and so many blocks in flight.
        """
        tried = [transfer(*shape) for shape in names.RAW_SHAPES]
        spent: list[list[float]] = [[] for _ in tried]
        for turn in range(1 if self.arguments.smoke else _SHAPE_TURNS):
            for place in range(len(tried)):
                number = (turn + place) % len(tried)
                one = tried[number]
                one.before()
                self.comm.Barrier()
                start = time.perf_counter()
                result = one.run()
                seconds = time.perf_counter() - start
                spent[number].append(max(self.comm.allgather(seconds)))
                one.after(result)
        medians = [statistics.median(seconds) for seconds in spent]
        best = medians.index(min(medians))
        full_name = names.raw_with(name, *names.RAW_SHAPES[best])
        return replace(tried[best], name=full_name, ceiling=True)

    def touch(self) -> None:
        """Change every leaf, in the same way on all ranks: replicas stay equal."""
        self._turns += 1
        touch_arrays(self.state.values(), self._turns)

    def differ(self) -> None:
        """Change every leaf, on each rank in its own way."""
        self._turns += 1
        touch_arrays(self.state.values(), self._turns * self.comm.size + self.comm.rank)

    def cold(self) -> None:
        """Drop what the page cache holds of the directory. Collective."""
        everything = not self.arguments.smoke
        self.on_root(lambda: ceilings.drop_cache(self.directory, everything=everything))()


def touch_arrays(arrays: Iterable[np.ndarray], value: float) -> None:
    """Write a value into the first element of each array."""
    for array in arrays:
        array.reshape(-1)[0] = value


def sleep_until_all_come(comm: MPI.Intracomm) -> None:
    """Wait for all ranks without spinning on the cores of those that work. Collective."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(_SLEEP_SECONDS)
