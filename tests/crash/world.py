# SPDX-License-Identifier: Apache-2.0
"""A small training to save and restore, and the judge of what comes back after a fault."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from mpi4py import MPI

from mpi_ckpt import (
    ArrayState,
    Block,
    CheckpointManager,
    ConcatState,
    KeepLast,
    Local,
    Options,
    PerRankState,
    ShardedArrayState,
    State,
)
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.leaves.leaf import Gate
from mpi_ckpt.state import Arrival, Capture, Structure
from mpi_ckpt.storage.format.layout import generation_number, is_partial_name
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.crash.replay import image_digest, read_image

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mpi_ckpt.leaves.leaf import LeafSpec

STATES = ("arrays", "plain")

_PLAIN_BYTES = 5000
_WIDTH = 2500  # 20 kB: five 4 KiB pieces to be torn
_FIELD = (6, 1000)  # 16 kB on each of three ranks


class Plain(State):
    """A plain state of bytes."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.value = b""

    def save(self, fileobj: BinaryIO) -> None:
        fileobj.write(self.value)

    def load(self, fileobj: BinaryIO) -> None:
        self.value = fileobj.read()


class Arrays(ArrayState):
    """Arrays that an asynchronous save may copy late, as it does with an overlap of torch.

    They stand for torch's tensors: torch takes seconds to import, in every process.
    Whoever changes them calls `wait` before, as an optimizer does in ``step()``.
    """

    def __init__(
        self, name: str, arrays: Mapping[str, np.ndarray], *, overlap: bool
    ) -> None:
        super().__init__(name, arrays, sync="root")
        self._gate = Gate()
        self._overlap = overlap

    def wait(self) -> None:
        """Return when the arrays may change."""
        self._gate.wait()

    def capture(self) -> Capture:
        captured = super().capture()
        if not self._overlap:
            return captured
        return Capture(None, [leaf.behind(self._gate) for leaf in captured.leaves])

    def prepare(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Arrival:
        self.wait()
        return super().prepare(structure, specs, strict=strict)


@dataclass(frozen=True)
class Saved:
    """What one save holds: the training step, and the steps its contents are of."""

    step: int
    arrays: int
    plain: int

    @classmethod
    def of(cls, step: int) -> Saved:
        return cls(step, step, step)


def arrays_at(step: int) -> dict[str, np.ndarray]:
    return {
        "weights": np.random.default_rng(step).random(_WIDTH),
        "moments": np.random.default_rng(step + 2).random(_WIDTH // 2),
        "biases": np.random.default_rng(step + 1).random(_WIDTH // 4),
        "count": np.array([step], np.int32),
    }


def plain_at(step: int) -> bytes:
    return step.to_bytes(4, "big") * (_PLAIN_BYTES // 4)


def pretend_hosts(comm: MPI.Intracomm) -> int:
    """Let few ranks share a host, or so they say; return how many: 1 of 2, else 2."""
    per_host = 2 if comm.size > 2 else 1
    socket.gethostname = lambda: f"host{comm.rank // per_host}"
    return per_host


class Tiles:
    """State that is cut over the ranks: rows of a field, numbered rows, and a value each.

    Args:
        comm: The communicator of the job.
    """

    def __init__(self, comm: Any) -> None:
        self._rank, self._size = comm.rank, comm.size
        self._mine = np.zeros_like(self._field_at(0))
        block = Block(self._mine, shape=_FIELD, offset=(self._share(_FIELD[0])[0], 0))
        self._rows = ConcatState("rows", self._rows_at(0))
        self._own = PerRankState("own", self._own_at(0), resize=_resized)
        self.states = [ShardedArrayState("field", {"x": block}), self._rows, self._own]

    def move(self, step: int) -> None:
        self._mine[:] = self._field_at(step)
        self._rows.arrays = self._rows_at(step)
        self._own.value = self._own_at(step)

    def problem(self, step: int) -> str | None:
        """Return the name of an array that is not that of a step."""
        if not np.array_equal(self._mine, self._field_at(step)):
            return "field/x"
        for name, expected in self._rows_at(step).items():
            if not np.array_equal(self._rows.arrays[name], expected):
                return f"rows/{name}"
        return None if self._own.value == self._own_at(step) else "own"

    def _own_at(self, step: int) -> list[int]:
        return [self._rank, step]

    def _share(self, count: int) -> tuple[int, int]:
        return count * self._rank // self._size, count * (self._rank + 1) // self._size

    def _field_at(self, step: int) -> np.ndarray:
        first, end = self._share(_FIELD[0])
        return np.random.default_rng(step + 3).random(_FIELD)[first:end]

    def _rows_at(self, step: int) -> dict[str, np.ndarray]:
        # Another number at each step, and of each rank.
        numbers = np.arange(step % 7, 60 + step % 7)[slice(*self._share(60))]
        return {"number": numbers, "place": np.stack([numbers + step, numbers - step], 1)}


def _resized(values: Sequence[list[int]], size: int) -> list[list[int]]:
    """Require the values of all ranks that have saved; make those of so many."""
    assert [rank for rank, _ in values] == list(range(len(values)))
    (step,) = {step for _, step in values}
    return [[rank, step] for rank in range(size)]


class Training:
    """The states of the training and their manager, by default a job of one rank.

    With ``overlap`` an asynchronous save copies the arrays late; with ``cut`` there is
    state that is cut over the ranks, of the same steps as the arrays.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int = 3,
        comm: Any = None,
        overlap: bool = False,
        cut: bool = False,
        local: Local | None = None,
        **options: Any,
    ) -> None:
        comm = MPI.COMM_SELF if comm is None else comm
        self.arrays = Arrays("arrays", arrays_at(0), overlap=overlap)
        self.plain = Plain()
        self.tiles = Tiles(comm) if cut else None
        states: list[State] = [self.arrays, self.plain]
        if self.tiles is not None:
            states += self.tiles.states
        self.manager = CheckpointManager(
            root,
            states,
            comm=comm,
            options=Options(retention=KeepLast(keep), preemption_signals=(), **options),
            local=local,
        )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()

    def move(self, step: int, moved: Collection[str] = STATES) -> None:
        """Bring some of the states to a step."""
        if "arrays" in moved:
            self.arrays.wait()
            for name, array in arrays_at(step).items():
                self.arrays.arrays[name][:] = array
            if self.tiles is not None:
                self.tiles.move(step)
        if "plain" in moved:
            self.plain.value = plain_at(step)

    def save(self, step: int, only: Collection[str] | None = None) -> None:
        """Bring the states that are saved to a step; return when all is done."""
        self.move(step, STATES if only is None else only)
        self.manager.save(step, only=only)
        self.manager.wait()  # also for what is pruned behind the training

    def restore(self) -> Saved | None:
        """Restore; say what came.

        Raises:
            ValueError: If the contents were never saved by anybody.
        """
        report = self.manager.restore()
        return None if report is None else self.holds(report.step)

    def holds(self, step: int) -> Saved:
        arrays = self.arrays.arrays
        number = int(arrays["count"][0])
        for name, expected in arrays_at(number).items():
            if not np.array_equal(arrays[name], expected):
                raise ValueError(f"the array {name} is no saved one")
        problem = None if self.tiles is None else self.tiles.problem(number)
        if problem is not None:
            raise ValueError(f"the array {problem} is not the one saved with the others")
        plain = int.from_bytes(self.plain.value[:4], "big")
        if self.plain.value != plain_at(plain):
            raise ValueError("the plain state is no saved one")
        return Saved(step, number, plain)


def scratch() -> Path:
    """Return a new directory in memory where there is one: fsync costs nothing there."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return Path(tempfile.mkdtemp(prefix="mpi_ckpt-crash-", dir=memory if usable else None))


def empty(directory: Path) -> None:
    """Delete all that is in a directory."""
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def leftovers(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if is_partial_name(name)]


def judge(
    root: Path,
    saves: Sequence[Saved],
    acked: int,
    *,
    bad: frozenset[str] = frozenset(),
    cut: bool = False,
    next_step: int = 900,
    gone_on: set[bytes] | None = None,
) -> str | None:
    """Start again in a directory as a crash left it; say what is wrong, if anything.

    Args:
        root: The checkpoint directory, which need not exist.
        saves: All saves so far, in order, the last ones perhaps never finished.
        acked: Index of the last that was acknowledged; -1 for none.
        bad: Names of generations that were damaged on purpose.
        cut: Whether they hold state that is cut over the ranks.
        next_step: Step of the save that is tried at last.
        gone_on: Digests of what recoveries have left, and from which a save was good: from
            an equal one none is tried again. Most crash states are soon the same.

    Returns:
        None, or a line that begins with TORN (a generation with its final name that does
        not verify), NONE (nothing can be loaded), WRONG (loaded what nobody saved), LOST
        (older than acknowledged), STUCK (cannot go on) or LEFTOVER.
    """
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if generation_number(path.name) is not None and path.name not in bad:
            try:
                with GenerationReader(path) as reader:
                    verify(reader)
            except CheckpointError as error:
                return f"TORN {error}"
    with Training(root, cut=cut) as training:
        if fault := fault_of_restore(training, saves, acked):
            return fault
        left = b"" if gone_on is None else image_digest(read_image(root))
        if gone_on is not None and left in gone_on:
            return None
        fault = _go_on(training, root, next_step)
        if gone_on is not None and fault is None:
            gone_on.add(left)
        return fault


def fault_of_restore(training: Training, saves: Sequence[Saved], acked: int) -> str | None:
    """Restore; return what is wrong with what came back, as `judge` does, if anything."""
    try:
        found = training.restore()
    except CheckpointError as error:
        return f"NONE {error}"
    except ValueError as error:
        return f"WRONG {error}"
    if found is None and acked >= 0:
        return f"NONE nothing found, {saves[acked]} was acknowledged"
    if found is not None and found not in saves:
        return f"WRONG {found} is none of {saves}"
    if found is not None and saves.index(found) < acked:
        return f"LOST {found} came back, {saves[acked]} was acknowledged"
    return None


def _go_on(training: Training, root: Path, step: int) -> str | None:
    try:
        training.save(step)
    except CheckpointError as error:
        return f"STUCK {error}"
    left = leftovers(root)
    if left:
        return f"LEFTOVER {left}"
    training.plain.value = b""
    if training.restore() != Saved.of(step):
        return "STUCK the next save does not come back"
    return None
