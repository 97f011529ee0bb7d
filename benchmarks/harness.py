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
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mpi4py import MPI

__all__ = [
    "Contender",
    "Figure",
    "Group",
    "describe_machine",
    "file_system",
    "idle_share",
    "measure",
    "read_figures",
]

_VERSIONS = (
    "mpi_ckpt",
    "mpi4py",
    "numpy",
    "torch",
    "safetensors",
    "torchsnapshot",
    "adaptdl",
    "tensorstore",
    "horovod",
)


def _nothing() -> None:
    pass


def _no_values(_: object) -> dict[str, float]:
    return {}


@dataclass(frozen=True, slots=True)
class Contender:
    """One thing to be timed.

    Attributes:
        name: For the table; `benchmarks.targets` finds it by this.
        run: The timed act, called on every rank.
        before: Done before each run, not timed: clean-up, dropping caches.
        after: Done after each run, not timed, with what the run returned: waiting for
            what it left to the background, so that the next contender has the machine.
        values: More to note of a run than its seconds, from what it returned. Called on
            every rank; root's values count.
        ceiling: Whether it is a raw limit that others are compared with.
        durable: Whether its bytes survive a power cut when it returns.
    """

    name: str
    run: Callable[[], Any]
    before: Callable[[], object] = _nothing
    after: Callable[[Any], object] = _no_values
    values: Callable[[Any], Mapping[str, float]] = _no_values
    ceiling: bool = False
    durable: bool = True


@dataclass(frozen=True, slots=True)
class Group:
    """Contenders that do the same with the same bytes, so that they can be compared.

    Attributes:
        name: Tells the groups of a case apart.
        nbytes: Bytes that each contender handles.
        contenders: In the order in which they take turns.
    """

    name: str
    nbytes: int
    contenders: Sequence[Contender]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What was measured of one contender in one group: slowest rank of each repeat.

    Attributes:
        run: When the run of the suite began; figures of one run may be compared.
        case: Name of the case.
        group: Name of the group in the case.
        contender: Name of the contender.
        ranks: Ranks that ran it.
        hosts: Different host names among them.
        nbytes: Bytes that it handled.
        seconds: One for each repeat.
        values: What else was noted of it, medians.
        workload: Whose shapes were saved.
        ceiling: As for `Contender`.
        durable: As for `Contender`.
        idle_share: Share of all cores that was idle before.
        machine: Processor, file system, MPI, versions, commit.
    """

    case: str
    group: str = ""
    contender: str
    ranks: int
    hosts: int = 1
    nbytes: int
    seconds: Sequence[float]
    values: Mapping[str, float] = field(default_factory=dict)
    workload: str = ""
    run: str = ""
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

    @classmethod
    def from_json(cls, line: str) -> Figure:
        """Read a line of `to_json`; what a newer suite added is left out."""
        record = json.loads(line)
        return cls(
            **{key: record[key] for key in cls.__dataclass_fields__ if key in record}
        )


def read_figures(lines: Iterable[str]) -> list[Figure]:
    """Read the figures of a JSON-lines file."""
    return [Figure.from_json(line) for line in lines if line.strip()]


def measure(
    comm: MPI.Intracomm,
    case: str,
    group: Group,
    *,
    repeats: int,
    warmups: int = 1,
    workload: str = "",
    run: str = "",
    machine: Mapping[str, Any] | None = None,
    idle_seconds: float = 0.5,
) -> list[Figure]:
    """Time contenders in turn, A B C, B C A, C A B: a drifting machine hits all alike.

    Collective. Each turn begins with the next contender, as what one leaves behind (dirty
    pages, the credit of a shared disk) is felt by the one after it.

    Args:
        comm: Its ranks run each contender together; a barrier stands before each run.
        case: Name of the case.
        group: What to time.
        repeats: Runs that count.
        warmups: Runs before those, which do not.
        workload: Whose shapes these are.
        run: When this run of the suite began.
        machine: What `describe_machine` says.
        idle_seconds: How long to look how idle the machine is before.

    Returns:
        Figures, the same on every rank but for ``values``, which are root's.
    """
    idle = idle_share(idle_seconds)
    hosts = len(set(comm.allgather(platform.node())))
    seconds: dict[str, list[float]] = {contender.name: [] for contender in group.contenders}
    values: dict[str, dict[str, list[float]]] = {
        contender.name: {} for contender in group.contenders
    }
    for turn in range(warmups + repeats):
        first = turn % len(group.contenders)
        for contender in [*group.contenders[first:], *group.contenders[:first]]:
            contender.before()
            comm.Barrier()
            start = time.perf_counter()
            result = contender.run()
            spent = comm.allgather(time.perf_counter() - start)
            noted = contender.values(result)
            contender.after(result)
            if turn >= warmups:
                seconds[contender.name].append(max(spent))
                for key, value in noted.items():
                    values[contender.name].setdefault(key, []).append(value)
    return [
        Figure(
            case=case,
            group=group.name,
            contender=contender.name,
            ranks=comm.size,
            hosts=hosts,
            nbytes=group.nbytes,
            seconds=tuple(seconds[contender.name]),
            values={k: statistics.median(v) for k, v in values[contender.name].items()},
            workload=workload,
            run=run,
            ceiling=contender.ceiling,
            durable=contender.durable,
            idle_share=idle,
            machine=dict(machine or {}),
        )
        for contender in group.contenders
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


def describe_machine(directory: Path | None = None) -> dict[str, Any]:
    """Return what a figure means nothing without: processor, versions, commit.

    Args:
        directory: Where files are written, for the type of its file system.
    """
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "file_system": file_system(directory) if directory else "",
        "python": platform.python_version(),
        "mpi": f"{name} {'.'.join(map(str, version))}",
        "commit": _commit(),
        **{name: _version(name) for name in _VERSIONS},
    }


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the type of the file system a path is on, ``""`` where nobody tells."""
    path = path.resolve()
    kind, longest = "", -1
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, point, mounted, *_ = line.split(" ")
        # The kernel writes blanks in names as octal.
        point = point.replace("\\040", " ")
        # Of two on one mount point the later covers the earlier.
        if path.is_relative_to(point) and len(point) >= longest:
            kind, longest = mounted, len(point)
    return kind


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
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
