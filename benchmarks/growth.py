# SPDX-License-Identifier: Apache-2.0
"""How counts grow with the ranks, and where that ends: pure functions and assumptions."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mpi_ckpt.comm.topology import chain_piece_bytes
from mpi_ckpt.storage.filesystem import REMOVERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "KNOWN",
    "MEASURED",
    "Cluster",
    "Growth",
    "Key",
    "Wall",
    "explain",
    "fit",
    "fit_all",
    "fit_tree",
    "grown",
    "human_bytes",
    "human_seconds",
    "seconds",
    "walls",
    "words",
]

Who = Literal["root", "others"]
_WHO: tuple[Who, Who] = ("root", "others")

QUANTITIES = (
    *("collectives", "messages", "mpi_bytes", "sent"),
    *("file_operations", "removals", "transfers", "file_bytes"),
)
# Texts in which numbers and times stand differ by some bytes from run to run.
SLACK = {"mpi_bytes": 32.0, "file_bytes": 32.0}
_TREE_SLACK = 1.5
_TREE_SHARE = 0.5


OUTSIDE = "before the library"


class Key(NamedTuple):
    """What was counted, and on whom."""

    phase: str
    quantity: str
    who: Who


@dataclass(frozen=True, slots=True)
class Growth:
    """A count as a function of the ranks.

    Attributes:
        base: What does not grow.
        per_rank: What each rank adds.
        per_doubling: What twice as many ranks add, as a tree does.
    """

    base: float
    per_rank: float
    per_doubling: float = 0

    def at(self, ranks: int) -> float:
        """Return the count with so many ranks."""
        return self.base + self.per_rank * ranks + self.per_doubling * math.log2(ranks)


# --- what grows ----------------------------------------------------------------------


def grown(lines: Iterable[Mapping[str, Any]]) -> dict[Key, dict[int, float]]:
    """Arrange counts: for each key the most that any such rank had, by number of ranks.

    Of the messages that others send it is the mean: which of them is the busiest in a tree
    changes with its shape.

    Args:
        lines: What ``measure`` wrote.
    """
    counts: dict[Key, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        who: Who = "root" if line["rank"] == 0 else "others"
        for quantity in QUANTITIES:
            count = line.get(quantity, 0)
            if count is not None:
                counts[Key(line["phase"], quantity, who)][line["ranks"]].append(count)
    return {
        key: {
            ranks: statistics.mean(each) if key[1:] == ("sent", "others") else max(each)
            for ranks, each in by_ranks.items()
        }
        for key, by_ranks in counts.items()
    }


def fit(counts: Mapping[int, float], slack: float = 0) -> Growth:
    """Return how a count grows with the ranks: as a line, or as a tree.

    Args:
        counts: The count by number of ranks. One rank alone has nobody to meet, so it
            tells nothing of growth.
        slack: What is less than this apart is the same.
    """
    known = {ranks: count for ranks, count in counts.items() if ranks > 1} or dict(counts)
    many = max(known)
    # What is the same for the two largest sizes has come to its end.
    before = max((ranks for ranks in known if ranks < many), default=many)
    if abs(known[many] - known[before]) <= slack:
        return Growth(known[many], 0)
    tree = fit_tree(known)
    fits = all(abs(tree.at(ranks) - count) <= slack for ranks, count in known.items())
    if tree.per_doubling > 0 and (fits or tree.per_rank == 0):
        return tree
    mean_x = sum(known) / len(known)
    mean_y = sum(known.values()) / len(known)
    spread = sum((x - mean_x) ** 2 for x in known)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in known.items()) / spread
    return Growth(mean_y - slope * mean_x, slope)


def fit_tree(counts: Mapping[int, float]) -> Growth:
    """Return the growth of what goes through trees, and perhaps also to each rank.

    Args:
        counts: The count by number of ranks. The three largest tell: a tree adds as much
            at each doubling, a line twice as much as at the doubling before.
    """
    *_, few, some, many = [0, 0, *sorted(ranks for ranks in counts if ranks > 1)]
    if not few or some != 2 * few or many != 2 * some:
        return Growth(counts[max(counts)], 0)
    first, second = counts[some] - counts[few], counts[many] - counts[some]
    each = (second - first) / (some - few)
    # Half a message a rank: less comes from ranks that do not send in every round, and
    # from libraries that build other trees for more ranks.
    each = each if each > _TREE_SHARE and each * few > _TREE_SLACK else 0.0
    doubling = second - each * (many - some)
    return Growth(
        counts[many] - each * many - doubling * math.log2(many), each, max(doubling, 0.0)
    )


def fit_all(lines: Iterable[Mapping[str, Any]]) -> dict[Key, Growth]:
    """Return the growth of all that was counted."""
    return {
        key: fit_tree(counts)
        if key.quantity == "sent"
        else fit(counts, SLACK.get(key.quantity, 0))
        for key, counts in grown(lines).items()
    }


@dataclass(frozen=True, slots=True)
class Known:
    """Growth that is known: where, why, and what would remove it.

    Attributes:
        phase: Where it begins to be seen.
        quantities: What grows there.
        whose: On which ranks.
        why: What it comes from.
        remedy: What removes it.
        held: The share of the bytes from all ranks that is in memory at once; none if they
            pass through a window.
    """

    phase: str
    quantities: tuple[str, ...]
    whose: tuple[Who, ...]
    why: str
    remedy: str
    held: float = 1


KNOWN = (
    Known(
        "start",
        ("mpi_bytes", "sent"),
        ("root", "others"),
        "80 bytes of every rank of the same host, for its process: grows with the ranks of "
        "a host, here the one host of all",
        "processes looked up when an error is worded",
    ),
    Known(
        "save, random streams",
        ("messages", "mpi_bytes", "file_bytes"),
        ("root",),
        "root takes and writes the streams of all ranks, some at a time; the names and "
        "digests that it keeps take half as much memory",
        "each node writes its ranks' parts; or counter-based streams: one seed for all",
        held=3.1 / 5.8,
    ),
    Known(
        "save, all write",
        ("mpi_bytes",),
        ("root",),
        "root tells every writer its share, and takes a record of its file",
        "shares that follow from rank and size alone",
    ),
    Known(
        "remember, random streams",
        ("messages", "mpi_bytes"),
        ("root",),
        "each rank holds the streams of all, so that any may be lost",
        "a few holders, on hosts apart",
    ),
    Known(
        "remember, random streams",
        ("mpi_bytes",),
        ("others",),
        "each rank holds the streams of all, so that any may be lost; and passes on what "
        "its neighbours tell root, which it does not keep",
        "a few holders, on hosts apart",
        held=5.8 / 6.7,
    ),
    Known(
        "restore, random streams",
        ("messages", "mpi_bytes", "file_bytes"),
        ("root",),
        "root reads the streams of all ranks and sends each rank its own, those of "
        "neighbours together if there are more than 16 ranks",
        "let one rank of each node read its ranks' parts; or counter-based streams",
        held=False,
    ),
    Known(
        "save, cut",
        ("mpi_bytes", "file_bytes"),
        ("root",),
        "root takes the boxes of every rank, proves that they tile the arrays, and sends "
        "each rank the numbers of those that it writes; the manifest names every file",
        "boxes joined by node leaders, and proven for a part of the array by each",
    ),
    Known(
        "save, cut as before",
        ("mpi_bytes", "removals", "file_bytes"),
        ("root",),
        "root takes a record of the file of every rank, and removes the files of the "
        "generation before, behind the training",
        "one file a node, by Options(writers='node')",
    ),
    Known(
        "restore, same boxes",
        ("mpi_bytes", "file_bytes"),
        ("root",),
        "root takes the list of tiles that every rank reads, and what the rank wants, "
        "plans for all, and sends each rank its own part of the plan",
        "lists joined by node leaders; each plans for its own files",
    ),
    Known(
        "restore, moved boxes",
        ("mpi_bytes", "file_bytes"),
        ("root",),
        "as with the same boxes; a rank exchanges rows with its neighbours alone",
        "as with the same boxes",
    ),
    *(
        Known(
            phase,
            ("mpi_bytes",),
            ("others",),
            "a rank passes on what its neighbours tell root, or root tells them, up to 64 "
            "KiB for each doubling of the ranks; what is longer goes past it",
            "nothing need: it ends there",
            held=0,
        )
        for phase in (
            *("save, random streams", "save, all write", "save, cut"),
            *("save, cut as before", "restore, same boxes", "restore, moved boxes"),
        )
    ),
)


def explain(key: Key) -> Known | None:
    """Return what is known of a growth, None if it is news. Pure."""
    # What root posts to every rank is also sent.
    names = {key.quantity, "messages" if key.quantity == "sent" else key.quantity}
    for known in KNOWN:
        if (
            known.phase == key.phase
            and names.intersection(known.quantities)
            and key.who in known.whose
        ):
            return known
    return None


# --- where it ends -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a large machine can do, and how much of it a checkpoint may take.

    The defaults are assumptions of a usual cluster, round and on the slow side, not
    measurements: give those of yours.

    Attributes:
        latency: Seconds of one hop. Small messages on InfiniBand or Slingshot take 1 to 2
            us; with Python between two of them, 5.
        message: Seconds that root spends on each message of many that it receives:
            posting it from Python and matching it.
        bandwidth: Bytes per second of the link of a host: 100 Gbit/s.
        ranks_of_host: Ranks on each host.
        file_operation: Seconds of one operation on a parallel file system: a round trip
            to its servers.
        transfer: Seconds of one call that writes or reads, beside its bytes.
        disk: Bytes per second that one client writes or reads there.
        disk_of_all: Bytes per second that it takes from all of them.
        metadata: Operations per second that the file system takes from all clients.
        imports: Operations with which one rank starts Python and imports MPI, NumPy and
            torch from a shared file system.
        state: Bytes of the state: 100M parameters with Adam.
        tolerable: Seconds that growth may add to any phase.
        start: Seconds that starting may take.
        root_memory: Bytes beside the state on root, of the suite's targets.
        rank_memory: The same on any other rank.
    """

    latency: float = 5e-6
    message: float = 5e-6
    bandwidth: float = 12.5e9
    ranks_of_host: float = 4
    file_operation: float = 2e-3
    transfer: float = 20e-6
    disk: float = 1.5e9
    disk_of_all: float = 100e9
    metadata: float = 50e3
    imports: float = 3000
    state: float = 1.2e9
    tolerable: float = 1.0
    start: float = 60.0
    root_memory: float = 128 * 2**20
    rank_memory: float = 64 * 2**20


# Phases that move the state itself once: counted with a small one, reckoned with the real.
# Where all write or read it, it is shared out: their counts fall with the ranks, or stay.
_MOVES = {
    "sync, all differ": "sent",
    "restore": "sent",
    "save": "written",
    "save, all write": "shared",
    "save, cut": "shared",
    "save, cut as before": "shared",
    "restore, same boxes": "shared",
    "restore, moved boxes": "shared",
}


def rounds(ranks: int) -> int:
    """Return the depth of a tree of so many ranks."""
    return math.ceil(math.log2(ranks)) if ranks > 1 else 0


def seconds(
    phase: str, growths: Mapping[Key, Growth], ranks: int, cluster: Cluster
) -> float:
    """Return how long a phase takes on the slower of root and others, by the model.

    What is sent or written is reckoned at its bandwidth; trees take their depth in hops.
    """
    state = {
        "sent": _broadcast_seconds(ranks, cluster),
        "written": cluster.state / cluster.disk,
        "shared": cluster.state / min(cluster.disk * ranks, cluster.disk_of_all),
    }.get(_MOVES.get(phase, ""), 0.0)

    def on(who: Who) -> float:
        counts = {q: _at(growths, Key(phase, q, who), ranks) for q in QUANTITIES}
        return (
            counts["collectives"] * rounds(ranks) * cluster.latency
            + counts["messages"] * cluster.message
            + counts["mpi_bytes"] / cluster.bandwidth
            + counts["file_operations"] * cluster.file_operation
            + counts["removals"] * cluster.file_operation / REMOVERS
            + counts["transfers"] * cluster.transfer
            + counts["file_bytes"] / cluster.disk
        )

    each = _at(growths, Key(phase, "file_operations", "others"), ranks)
    return max(
        state + on("root"),
        state + on("others"),
        state + each * (ranks - 1) / cluster.metadata,
        # Root reads while it sends: the slower of the two, not both.
        cluster.state / cluster.disk if phase == "restore" else 0,
    )


def _broadcast_seconds(ranks: int, cluster: Cluster) -> float:
    """Return how long the state takes from one host to all others."""
    hosts = math.ceil(ranks / cluster.ranks_of_host)
    once = cluster.state / cluster.bandwidth
    if hosts == 1:
        return once
    piece = chain_piece_bytes(int(cluster.state), hosts)
    if piece is None:
        # As the libraries do it: scattered, then gathered by all.
        return 2 * once + 2 * rounds(hosts) * cluster.latency
    pieces = math.ceil(cluster.state / piece)
    turn = once / pieces + cluster.message
    return (pieces + hosts - 2) * turn


def _at(growths: Mapping[Key, Growth], key: Key, ranks: int) -> float:
    return max(0.0, growths[key].at(ranks)) if key in growths else 0.0


@dataclass(frozen=True, slots=True)
class Wall:
    """Where growth becomes too much.

    Attributes:
        ranks: The number of ranks from which on.
        where: What cannot go on there.
        limit: What is exceeded.
        at_most: What it would be with the most ranks looked at.
        remedy: What removes it.
    """

    ranks: int
    where: str
    limit: str
    at_most: str
    remedy: str


def walls(growths: Mapping[Key, Growth], cluster: Cluster, most: int) -> list[Wall]:
    """Return what stops at fewer than ``most`` ranks, first things first."""
    found = _outside_walls(cluster, most)
    for key, growth in growths.items():
        if (key.quantity, key.who) == ("file_operations", "others") and growth.base > 0:
            each = growth.base / cluster.metadata
            found.append(
                Wall(
                    math.ceil(cluster.tolerable / each),
                    f"{key.phase}: file operations of all ranks at once",
                    f"{cluster.tolerable:g} s more than with few ranks",
                    human_seconds(each * most),
                    "let fewer write: one of each node, or root",
                )
            )
        if growth.per_rank <= 0:
            continue
        posted = growths.get(Key(key.phase, "messages", key.who))
        if key.quantity == "sent" and posted is not None and posted.per_rank > 0:
            continue  # the same messages
        known = explain(key)
        remedy = known.remedy if known else "not looked into yet"
        where = f"{key.phase}: {words(key.quantity)} of {key.who}"
        each = _seconds_of_one(key.quantity, cluster) * growth.per_rank
        found.append(
            Wall(
                math.ceil(cluster.tolerable / each),
                where,
                f"{cluster.tolerable:g} s more than with few ranks",
                human_seconds(each * most),
                remedy,
            )
        )
        held = growth.per_rank * (1 if known is None else known.held)
        if key.quantity == "mpi_bytes" and held:
            memory = cluster.root_memory if key.who == "root" else cluster.rank_memory
            found.append(
                Wall(
                    math.ceil(memory / held),
                    where,
                    f"{human_bytes(memory)} of memory",
                    human_bytes(held * most),
                    remedy,
                )
            )
    return sorted((wall for wall in found if wall.ranks <= most), key=lambda w: w.ranks)


def _outside_walls(cluster: Cluster, most: int) -> list[Wall]:
    """Return those that counting does not show; a star says so."""
    each = cluster.imports / cluster.metadata
    return [
        Wall(
            math.ceil(cluster.start / each),
            f"{OUTSIDE}: every rank imports from one file system*",
            f"{cluster.start:g} s of starting",
            human_seconds(each * most),
            "the environment on each node's disk, or in one image that is broadcast",
        ),
    ]


def human_seconds(value: float) -> str:
    """Return seconds for a person, with their unit."""
    if value >= 1:
        return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def human_bytes(value: float) -> str:
    """Return bytes for a person, with their unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def words(quantity: str) -> str:
    """Return a quantity for a person."""
    return quantity.replace("_", " ").replace("mpi", "MPI")


def _seconds_of_one(quantity: str, cluster: Cluster) -> float:
    return {
        "collectives": rounds(100_000) * cluster.latency,
        "messages": cluster.message,
        "sent": cluster.message,
        "mpi_bytes": 1 / cluster.bandwidth,
        "file_operations": cluster.file_operation,
        "removals": cluster.file_operation / REMOVERS,
        "transfers": cluster.transfer,
        "file_bytes": 1 / cluster.disk,
    }[quantity]


# Counted with 2 to 16 ranks, and the same on Open MPI and MPICH: of each phase and quantity
# what root has, what each rank adds to it and (where there are six numbers) what each
# doubling adds; then the same of any other rank. What is sent was counted with 2 to 8.
_COUNTED = (
    ("start", "collectives", 9, 0, 9, 0),
    ("start", "messages", 0, 0, 2, 0, 0, 2),
    ("start", "mpi_bytes", 323, 80, 39, 323, 80, 39),
    ("start", "sent", 1, 0, 12, 6.3, 1.2, 2.3),
    ("sync, equal", "collectives", 6, 0, 6, 0),
    ("sync, equal", "mpi_bytes", 352, 0, 352, 0),
    ("sync, equal", "sent", 0, 0, 6, 5.1, 0, 1.4),
    ("sync, all differ", "collectives", 10, 0, 10, 0),
    ("sync, all differ", "mpi_bytes", 654288, 0, 654288, 0),
    ("sync, all differ", "sent", 3, 0, 9, 6.6, 0, 2.7),
    ("save", "collectives", 4, 0, 4, 0),
    ("save", "mpi_bytes", 498, 0, 498, 0),
    ("save", "sent", 3, 0, 3, 1.4, 0, 1.3),
    ("save", "file_operations", 29, 0, 0, 0),
    ("save", "transfers", 9, 0, 0, 0),
    ("save", "file_bytes", 670720, 0, 0, 0),
    ("step, nothing due", "collectives", 2, 0, 2, 0),
    ("step, nothing due", "mpi_bytes", 112, 0, 112, 0),
    ("step, nothing due", "sent", 0, 0, 1, 1.7, 0, 0.1),
    ("restore", "collectives", 7, 0, 7, 0),
    ("restore", "mpi_bytes", 654522, 0, 654522, 0),
    ("restore", "sent", 6, 0, 6, 2, 0, 2.7),
    ("restore", "file_operations", 6, 0, 0, 0),
    ("restore", "transfers", 6, 0, 0, 0),
    ("restore", "file_bytes", 666645, 0, 0, 0),
    ("one rank fails", "collectives", 3, 0, 3, 0),
    ("one rank fails", "messages", 0, 0, 1, 0, 0, 1),
    ("one rank fails", "mpi_bytes", 1906, 0, 2838, 0),
    ("one rank fails", "sent", 6, 0, 1, -0.4, 0, 1.4),
    ("remember", "collectives", 4, 0, 4, 0),
    ("remember", "mpi_bytes", 224, 0, 224, 0),
    ("remember", "sent", 0, 0, 4, 3.4, 0, 1),
    ("restore from memory", "collectives", 6, 0, 6, 0),
    ("restore from memory", "mpi_bytes", 1356, 0, 1356, 0),
    ("restore from memory", "sent", 3, 0, 5, 3.1, 0, 1.8),
    ("save, random streams", "collectives", 4, 0, 4, 0),
    ("save, random streams", "messages", -2, 2, 1, 2, 0, 1),
    ("save, random streams", "mpi_bytes", -5343, 5841, 15, 4649, 845, 15),
    ("save, random streams", "sent", 3, 0, 3, 4.4, 0, 1.3),
    ("save, random streams", "file_operations", 26, 0, 0, 0),
    ("save, random streams", "transfers", 6, 0, 0, 0),
    ("save, random streams", "file_bytes", 11819, 6317, 0, 0),
    ("restore, random streams", "collectives", 6, 0, 6, 0),
    ("restore, random streams", "messages", -1, 1, 1, 0),
    ("restore, random streams", "mpi_bytes", -8468, 9100, 9737, 0),
    ("restore, random streams", "sent", -2, 0, 9, 3.1, 0, 1.8),
    ("restore, random streams", "file_operations", 6, 0, 0, 0),
    ("restore, random streams", "transfers", 7, 0, 0, 0),
    ("restore, random streams", "file_bytes", 11069, 6378, 0, 0),
    ("remember, random streams", "collectives", 7, 0, 7, 0),
    ("remember, random streams", "messages", -2, 2, 1, 2, 0, 1),
    ("remember, random streams", "mpi_bytes", -2688, 11655, 7304, 6659),
    ("remember, random streams", "sent", 6, 0, 5, 5, 0, 2.3),
    ("save, all write", "collectives", 6, 0, 6, 0),
    ("save, all write", "messages", 0, 0, 1, 0, 0, 1),
    ("save, all write", "mpi_bytes", 617, 48, 36, 635, 51, 22),
    ("save, all write", "sent", 3, 0, 6, 3, 0, 2),
    ("save, all write", "file_operations", 26, 0, 5, 0),
    ("save, cut", "collectives", 11, 0, 11, 0),
    ("save, cut", "messages", 0, 0, 3, 0, 0, 3),
    ("save, cut", "mpi_bytes", 367, 518, 363, 520),
    ("save, cut", "sent", 6, 0, 10, 7.3, 0, 3.5),
    ("save, cut", "file_operations", 26, 0, 5, 0),
    ("save, cut", "transfers", 10, 0, 6, 0),
    ("save, cut", "file_bytes", 33578, 162, 24576, 0),
    ("save, cut as before", "collectives", 9, 0, 9, 0),
    ("save, cut as before", "messages", 0, 0, 1, 0, 0, 1),
    ("save, cut as before", "mpi_bytes", 635, 114, 11, 635, 114, 11),
    ("save, cut as before", "sent", 6, 0, 7, 4.7, 0, 2.8),
    ("save, cut as before", "file_operations", 20, 0, 5, 0),
    ("save, cut as before", "removals", 1, 1, 0, 0),
    ("save, cut as before", "transfers", 9, 0, 6, 0),
    ("save, cut as before", "file_bytes", 29486, 161, 24576, 0),
    ("restore, same boxes", "collectives", 8, 0, 8, 0),
    ("restore, same boxes", "messages", 0, 0, 3, 0, 0, 3),
    ("restore, same boxes", "mpi_bytes", -1948, 2692, -1956, 2695),
    ("restore, same boxes", "sent", 6, 0, 8, 3.6, 0, 3),
    ("restore, same boxes", "file_operations", 6, 0, 2, 0),
    ("restore, same boxes", "transfers", 5, 0, 2, 0),
    ("restore, same boxes", "file_bytes", 25410, 162, 20480, 0),
    ("restore, moved boxes", "collectives", 8, 0, 8, 0),
    ("restore, moved boxes", "messages", 1, 0, 3, 2, 0, 3),
    ("restore, moved boxes", "mpi_bytes", 2020, 2780, 3596, 2977),
    ("restore, moved boxes", "sent", 6, 0, 8, 4.6, 0, 3),
    ("restore, moved boxes", "file_operations", 14, 0, 2, 0),
    ("restore, moved boxes", "transfers", 6, 0, 2, 0),
    ("restore, moved boxes", "file_bytes", 29508, 162, 20480, 0),
)

MEASURED = {
    Key(phase, quantity, who): Growth(*numbers)
    for phase, quantity, *counts in _COUNTED
    for who, numbers in zip(
        _WHO, (counts[: len(counts) // 2], counts[len(counts) // 2 :]), strict=True
    )
}
"""Growth as counted when this was written; `fit_all` makes it from a new count."""
