# SPDX-License-Identifier: Apache-2.0
"""Measures contenders in turn and keeps what was measured; knows nothing of any of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

__all__ = ["Contender", "Figure", "describe_machine", "idle_share", "measure"]


@dataclass(frozen=True, slots=True)
class Contender:
    """One thing to be timed.

    Attributes:
        name: For the table.
        run: The timed act, called on every rank.
        before: Done before each run, not timed: clean-up, dropping caches.
        ceiling: Whether it is a raw limit that others are compared with.
        durable: Whether its bytes survive a power cut when it returns.
    """

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = lambda: None
    ceiling: bool = False
    durable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What was measured of one contender in one case: slowest rank of each repeat."""

    case: str
    contender: str
    ranks: int
    nbytes: int
    seconds: Sequence[float]
    ceiling: bool = False
    durable: bool = True
    idle_share: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median of the repeats in seconds."""
        return statistics.median(self.seconds)

    def to_json(self) -> str:
        """Return one JSON line."""
        return json.dumps({**asdict(self), "median": self.median})


def measure(
    comm: MPI.Intracomm,
    case: str,
    contenders: Sequence[Contender],
    *,
    nbytes: int,
    repeats: int,
    warmups: int = 1,
) -> list[Figure]:
    """Time contenders in turn, A B C A B C, so that a drifting machine hits all alike.

    Collective.

    Args:
        comm: Its ranks run each contender together; a barrier stands before each run.
        case: Name of the case.
        contenders: What to time.
        nbytes: Bytes that each handles.
        repeats: Runs that count.
        warmups: Runs before those, which do not.

    Returns:
        Figures, the same on every rank.
    """
    idle = idle_share()
    seconds: dict[str, list[float]] = {one.name: [] for one in contenders}
    for turn in range(warmups + repeats):
        for one in contenders:
            one.before()
            comm.Barrier()
            start = time.perf_counter()
            one.run()
            spent = comm.allgather(time.perf_counter() - start)
            if turn >= warmups:
                seconds[one.name].append(max(spent))
    machine = describe_machine()
    return [
        Figure(
            case=case,
            contender=one.name,
            ranks=comm.size,
            nbytes=nbytes,
            seconds=tuple(seconds[one.name]),
            ceiling=one.ceiling,
            durable=one.durable,
            idle_share=idle,
            machine=machine,
        )
        for one in contenders
    ]


def idle_share(window_seconds: float = 0.5) -> float:
    """Return the share of all cores that was idle in a short window just now."""

    def read() -> tuple[int, int]:
        fields = [
            int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        ]
        return fields[3] + fields[4], sum(fields)

    idle, total = read()
    time.sleep(window_seconds)
    later_idle, later_total = read()
    return (later_idle - idle) / max(1, later_total - total)


def describe_machine() -> dict[str, Any]:
    """Return what a figure means nothing without: processor, versions, commit."""
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "mpi": f"{name} {'.'.join(map(str, version))}",
        "commit": _commit(),
        **{name: _version(name) for name in ("mpi_ckpt", "mpi4py", "numpy", "torch")},
    }


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
