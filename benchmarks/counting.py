# SPDX-License-Identifier: Apache-2.0
"""Counts what each rank sends and does to the file system: no clock, so no noise.

MPI is seen through a communicator that counts and passes on, given to the manager in
place of the user's; files through ``mpi_ckpt.storage.filesystem``, the one seam.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from benchmarks.monitoring import SentMessages
from benchmarks.setting import sleep_until_all_come
from mpi_ckpt import (
    ArrayState,
    Block,
    CheckpointManager,
    KeepLast,
    Options,
    RNGState,
    ShardedArrayState,
)
from mpi_ckpt.elastic import Memory
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.storage import filesystem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from mpi_ckpt import State

__all__ = ["Cost", "count_phases", "sizes_up_to"]

# Names of MPI's calls in lower case, without the "I" of those that do not wait.
_COLLECTIVES = {
    *("barrier", "bcast", "gather", "gatherv", "scatter", "scatterv", "reduce", "scan"),
    *("allreduce", "allgather", "allgatherv", "alltoall", "alltoallv", "reduce_scatter"),
    *("dup", "split", "split_type", "create", "create_group", "free"),
}
_MESSAGES = {"send", "ssend", "bsend", "recv", "sendrecv"}
# Names in os.
_TRANSFERS = {"pwrite", "pwritev", "pread", "preadv", "write", "read"}
_FILE_OPERATIONS = {
    *("open", "mkdir", "rename", "replace", "link", "rmdir", "listdir", "lstat"),
    *("stat", "fsync", "fdatasync", "ftruncate", "posix_fallocate"),
}

_REMOVALS = {"unlink"}

# Fields that are cut over the ranks: of each, so many rows a rank.
_FIELDS, _ROWS, _COLUMNS = 4, 8, 64
_MOVED_ROWS = 2


@dataclass(slots=True, kw_only=True)
class Cost:
    """What one phase took on one rank.

    Attributes:
        ranks: Number of ranks that took part.
        rank: The rank.
        phase: What was done.
        collectives: Calls in which all ranks take part; the MPI library makes each a tree.
        messages: Sent and received between this rank and one other.
        mpi_bytes: Lengths of the buffers given to both; the longest of each call.
        file_operations: Calls of the operating system that name a file, change its length
            or make it durable: on a parallel file system a round trip each.
        removals: Removals of files: the same, but of many files several at a time.
        transfers: Calls that write or read; the client's cache takes them.
        file_bytes: Written and read by those.
        sent: Messages that left the rank, also inside of collectives; None where the MPI
            library does not count them.
        calls: All of them by name.
    """

    ranks: int
    rank: int
    phase: str
    collectives: int = 0
    messages: int = 0
    mpi_bytes: int = 0
    file_operations: int = 0
    removals: int = 0
    transfers: int = 0
    file_bytes: int = 0
    sent: int | None = None
    calls: dict[str, int] = field(default_factory=dict)


class _Tally:
    """Where the counts of this process go; files are written by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cost: Cost | None = None

    @contextlib.contextmanager
    def into(self, cost: Cost) -> Iterator[None]:
        """Count what happens in the block."""
        self._cost = cost
        try:
            yield
        finally:
            self._cost = None

    def note(self, name: str, *, mpi_bytes: int = 0, file_bytes: int = 0) -> None:
        """Add one call to what is being counted, if anything is."""
        kind = _kind(name)
        with self._lock:
            cost = self._cost
            if cost is not None:
                cost.calls[name] = cost.calls.get(name, 0) + 1
                setattr(cost, kind, getattr(cost, kind) + 1)
                cost.mpi_bytes += mpi_bytes
                cost.file_bytes += file_bytes


_TALLY = _Tally()


def _kind(name: str) -> str:
    """Return the field that counts a call; of MPI, Bcast, Ibcast and bcast are alike."""
    if name in _REMOVALS:
        return "removals"
    if name in _FILE_OPERATIONS:
        return "file_operations"
    if name in _TRANSFERS:
        return "transfers"
    for bare in (name.lower(), name.lower().removeprefix("i")):
        if bare in _COLLECTIVES:
            return "collectives"
        if bare in _MESSAGES:
            return "messages"
    return ""


class _CountingComm(MPI.Intracomm):
    """A communicator that counts; what it is duplicated or split into counts as well."""

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401 (any of MPI's methods)
        call = super().__getattribute__(name)
        if _kind(name) not in ("collectives", "messages"):
            return call

        def counted(*buffers: Any, **named: Any) -> Any:  # noqa: ANN401
            _TALLY.note(name, mpi_bytes=max(map(_nbytes, buffers), default=0))
            return call(*buffers, **named)

        return counted


class _CountingOS:
    """Stands in for ``os`` in the one module that does anything to files."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (any of os)
        call = getattr(os, name)
        if name not in _FILE_OPERATIONS | _REMOVALS | _TRANSFERS:
            return call

        def counted(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
            result = call(*arguments, **named)
            _TALLY.note(name, file_bytes=result if name in _TRANSFERS else 0)
            return result

        return counted


def _nbytes(buffer: object) -> int:
    """Return the length of a buffer as MPI takes it: bare, or first in a list."""
    if isinstance(buffer, (list, tuple)):
        return _nbytes(buffer[0]) if buffer else 0
    with contextlib.suppress(TypeError):
        return memoryview(buffer).nbytes  # type: ignore[arg-type]
    return 0


@contextlib.contextmanager
def _counting_files() -> Iterator[None]:
    vars(filesystem)["os"] = _CountingOS()
    try:
        yield
    finally:
        vars(filesystem)["os"] = os


def sizes_up_to(most: int) -> list[int]:
    """Return 1, 2, 4 and so on below ``most``, and ``most``. Pure."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def count_phases(comm: MPI.Intracomm, directory: Path, sizes: Sequence[int]) -> list[Cost]:
    """Do everything once with each number of ranks, and count.

    Collective.

    Args:
        comm: Its first ranks take part, the others sleep.
        directory: A new one, seen by root.
        sizes: How many ranks take part, one after the other.

    Returns:
        The costs of every rank, on root; an empty list elsewhere.
    """
    mine: list[Cost] = []
    with _counting_files():
        for size in sizes:
            part = comm.Split(0 if comm.rank < size else 1)
            if comm.rank < size:
                mine += _count_with(_CountingComm(part), directory / str(size))
            sleep_until_all_come(comm)
            part.Free()
    return [cost for costs in comm.gather(mine) or [] for cost in costs]


def _count_with(comm: MPI.Intracomm, directory: Path) -> list[Cost]:
    costs: list[Cost] = []
    sent = SentMessages()

    def count(phase: str, act: Callable[[], Any]) -> Any:  # noqa: ANN401
        cost = Cost(ranks=comm.size, rank=comm.rank, phase=phase)
        before = sent.total() if sent.is_counted else 0
        with _TALLY.into(cost):
            result = act()
        cost.sent = sent.total() - before if sent.is_counted else None
        costs.append(cost)
        return result

    def start(
        name: str,
        state: State,
        memory: Memory | None = None,
        **given: Any,  # noqa: ANN401
    ) -> CheckpointManager:
        options = Options(retention=KeepLast(1), preemption_signals=(), **given)
        where = directory / name
        return CheckpointManager(where, [state], comm=comm, options=options, memory=memory)

    def save(manager: CheckpointManager) -> None:
        manager.save()
        manager.wait()  # for root's thread too: what it removes counts here

    def fail() -> None:
        wanted = ["nobody"] if comm.rank == comm.size - 1 else None
        with contextlib.suppress(CheckpointError):
            manager.save(only=wanted)

    weights = _weights(seed=0)
    manager = count("start", lambda: start("plain", ArrayState("weights", weights)))
    count("sync, equal", manager.sync)
    for name, values in _weights(seed=1 + comm.rank).items():
        weights[name][:] = values
    count("sync, all differ", manager.sync)
    count("save", lambda: save(manager))
    count("step, nothing due", manager.step)
    count("restore", manager.restore)
    count("one rank fails", fail)
    manager.close()
    remembering = start("remembered", ArrayState("weights", _weights(seed=0)), Memory())
    count("remember", remembering.remember)
    count("restore from memory", remembering.restore)
    remembering.close()
    # Streams in one state are texts of one length, on all ranks.
    random.seed(0)
    # NumPy starts its own from the machine's noise, and numbers have as many digits as
    # they have.
    np.random.seed(0)
    parts = start("parts", RNGState())
    count("save, random streams", lambda: save(parts))
    count("restore, random streams", parts.restore)
    parts.close()
    parts = start("remembered parts", RNGState(), Memory())
    count("remember, random streams", parts.remember)
    parts.close()
    if "writers" in Options.__dataclass_fields__:
        shared = start("shared", ArrayState("weights", _weights(seed=0)), writers="all")
        count("save, all write", lambda: save(shared))
        shared.close()
    fields = _fields(comm.rank, comm.size)
    cut = start("cut", ShardedArrayState("fields", fields))
    count("save, cut", lambda: save(cut))
    for block in fields.values():
        np.asarray(block.array)[:] = -1
    count("save, cut as before", lambda: save(cut))
    count("restore, same boxes", cut.restore)
    cut.close()
    fields = _fields(comm.rank, comm.size, moved_by=_MOVED_ROWS)
    moved = start("cut", ShardedArrayState("fields", fields))
    count("restore, moved boxes", moved.restore)
    moved.close()
    return costs


def _weights(seed: int) -> dict[str, np.ndarray]:
    stream = np.random.default_rng(seed)
    # More leaves than ranks, and not all alike, so that all have something to write.
    return {f"layer-{n:02d}": stream.random(1000 + 100 * n) for n in range(32)}


def _fields(rank: int, size: int, *, moved_by: int = 0) -> dict[str, Block]:
    """Return fields of which each rank has as many rows, whatever the number of ranks.

    Args:
        rank: The rank.
        size: The number of ranks.
        moved_by: Rows by which its box begins later. The first rank then has more rows, the
            last fewer; each of the others has some rows of its own box and the first ones
            of the next rank's box.
    """
    first = rank * _ROWS + (moved_by if rank else 0)
    end = (rank + 1) * _ROWS + (moved_by if rank < size - 1 else 0)
    stream = np.random.default_rng(rank)
    shape = (size * _ROWS, _COLUMNS)
    return {
        f"field-{n}": Block(
            stream.random((end - first, _COLUMNS)), shape=shape, offset=(first, 0)
        )
        for n in range(_FIELDS)
    }
