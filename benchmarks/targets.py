# SPDX-License-Identifier: Apache-2.0
"""What the figures are to reach: ``python -m benchmarks targets figures.jsonl``.

Every target is a ratio of two figures of one run, so that it means the same on any machine.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks import names
from benchmarks.harness import Figure, read_figures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["TARGETS", "Result", "Target", "evaluate", "main", "to_markdown"]

_MIB = 1 << 20
# Headers and the manifest come to the bytes of the leaves; they are not to count.
_ONCE = 1.001


class Figures:
    """The figures of one case with one number of ranks on one number of hosts.

    Args:
        figures: All of one run.
    """

    def __init__(self, figures: Iterable[Figure]) -> None:
        self._figures = {(figure.group, figure.contender): figure for figure in figures}
        first = next(iter(self._figures.values()))
        self.ranks, self.hosts = first.ranks, first.hosts

    def find(self, name: str, group: str | None = None) -> Figure | None:
        """Return a contender's figure, of any group if none is named."""
        for (its_group, contender), figure in self._figures.items():
            if contender == name and group in (None, its_group):
                return figure
        return None

    def seconds(self, name: str, group: str | None = None) -> float | None:
        """Return a contender's median."""
        figure = self.find(name, group)
        return figure.median if figure else None

    def fastest(self, candidates: Sequence[str], group: str | None = None) -> float | None:
        """Return the smallest median of some contenders."""
        found = [self.seconds(name, group) for name in candidates]
        return min((value for value in found if value is not None), default=None)

    def value(self, name: str, key: str, group: str | None = None) -> float | None:
        """Return what else was noted of a contender."""
        figure = self.find(name, group)
        return figure.values.get(key) if figure else None


@dataclass(frozen=True, slots=True)
class Target:
    """One line of what is to be reached.

    Attributes:
        name: What is measured.
        case: The case whose figures tell.
        bound: What is to be reached.
        at_least: Whether the bound is a lower one.
        measure: Gives the measured number; None where a figure is missing.
        ranks: Only with so many ranks; None for any number.
        several_hosts: Whether it is about several hosts, else about one.
        unit: What the number counts; ``""`` for a ratio.
    """

    name: str
    case: str
    bound: float
    at_least: bool
    measure: Callable[[Figures], float | None]
    ranks: int | None = None
    several_hosts: bool = False
    unit: str = ""

    def is_met(self, measured: float) -> bool:
        """Tell whether a number reaches the bound."""
        return measured >= self.bound if self.at_least else measured <= self.bound

    def applies(self, figures: Figures) -> bool:
        """Tell whether figures with these ranks and hosts are what it is about."""
        several = figures.hosts > 1
        return several == self.several_hosts and self.ranks in (None, figures.ranks)


@dataclass(frozen=True, slots=True)
class Result:
    """A target beside what was measured; None where nothing was.

    Attributes:
        target: The target.
        ranks: Number of ranks of the figures; 0 where there are none.
        hosts: Number of hosts of the figures; 0 where there are none.
        measured: The number to be compared with the target's bound.
    """

    target: Target
    ranks: int = 0
    hosts: int = 0
    measured: float | None = None

    @property
    def verdict(self) -> str:
        """``met``, ``missed`` or ``not measured``."""
        if self.measured is None:
            return "not measured"
        return "met" if self.target.is_met(self.measured) else "missed"

    def cells(self) -> tuple[str, str, str, str, str]:
        """Return the row of a table."""
        target, where = self.target, ""
        if self.ranks:
            where = f"{self.ranks}" + (f" on {self.hosts} hosts" if self.hosts > 1 else "")
        return (
            target.name,
            where,
            "" if self.measured is None else _number(self.measured, target.unit),
            f"{'>=' if target.at_least else '<='} {_number(target.bound, target.unit)}",
            self.verdict,
        )


def ratio(above: float | None, below: float | None) -> float | None:
    """Divide, if both are there."""
    return None if above is None or not below else above / below


def times(
    above: str, below: str, group: str | None = None
) -> Callable[[Figures], float | None]:
    """Return a measure: seconds of one contender divided by those of another."""
    return lambda figures: ratio(
        figures.seconds(above, group), figures.seconds(below, group)
    )


def _best_raw(
    raw: str, ours: str, group: str | None = None
) -> Callable[[Figures], float | None]:
    candidates = [names.raw_with(raw, *shape) for shape in names.RAW_SHAPES]
    return lambda figures: ratio(
        figures.fastest(candidates, group), figures.seconds(ours, group)
    )


def _sync_differing(figures: Figures) -> float | None:
    group = "all differ"
    best = figures.fastest([names.BCAST, names.IBCAST], group)
    return ratio(best, figures.seconds(names.SYNC, group))


def _share(name: str, key: str) -> Callable[[Figures], float | None]:
    def measure(figures: Figures) -> float | None:
        figure = figures.find(name)
        return ratio(figure.values.get(key), figure.nbytes) if figure else None

    return measure


def _peak(name: str, key: str, *, beyond_state: bool) -> Callable[[Figures], float | None]:
    def measure(figures: Figures) -> float | None:
        figure = figures.find(name)
        if figure is None or (key == "peak_bytes_others" and figures.ranks == 1):
            return None
        peak = figure.values.get(key)
        return None if peak is None else (peak - beyond_state * figure.nbytes) / _MIB

    return measure


def _small(group: str) -> Callable[[Figures], float | None]:
    def measure(figures: Figures) -> float | None:
        many = figures.seconds(names.MANY_LEAVES, group)
        return ratio(many, figures.seconds(names.ONE_LEAF, group))

    return measure


def _against_peers() -> list[Target]:
    """Never slower than any peer in the same run, whatever its disk."""
    peers = (names.TORCH, names.SAFETENSORS, names.DCP, names.TORCHSNAPSHOT, names.ADAPTDL)
    pairs = [("save", names.durable(peer), names.SAVE) for peer in peers]
    # torch.load stands by itself: with a target of its own.
    pairs += [("restore", names.load(peer), names.RESTORE) for peer in peers[1:]]
    return [
        Target(f"{case}: {peer} / ours", case, 1.0, True, times(peer, ours))
        for case, peer, ours in pairs
    ]


def _peaks() -> list[Target]:
    root, others = "peak_bytes_root", "peak_bytes_others"
    rows = [
        ("blocking save, root", names.SAVE, root, 128.0, False),
        ("asynchronous save beyond the state, root", names.SAVE_ASYNC, root, 128.0, True),
        ("restore, root", names.RESTORE, root, 128.0, False),
        ("blocking save, other ranks", names.SAVE, others, 64.0, False),
        ("asynchronous save, other ranks", names.SAVE_ASYNC, others, 64.0, False),
        ("restore, other ranks", names.RESTORE, others, 64.0, False),
    ]
    return [
        Target(
            f"peak memory: {what}",
            "memory",
            bound,
            False,
            _peak(name, key, beyond_state=beyond),
            unit="MiB",
        )
        for what, name, key, bound, beyond in rows
    ]


def _step_microseconds(figures: Figures) -> float | None:
    group = "beside work"
    ours, bare = (figures.seconds(n, group) for n in (names.STEP, names.NO_MANAGER))
    steps = figures.value(names.STEP, "steps", group)
    if ours is None or bare is None or not steps:
        return None
    return 1e6 * (ours - bare) / steps


def _beside_horovod() -> list[Target]:
    """What Horovod's users do at the start of a run, and at each commit."""
    training, horovods = names.BROADCAST_TRAINING, names.HOROVOD_TRAINING
    small = names.BROADCAST_OBJECT
    return [
        Target(
            f"model and optimizer, {group}: Horovod / ours",
            "horovod",
            bound,
            True,
            times(horovods, training, group),
        )
        for group, bound in (("equal", 3.0), ("all differ", 1.0))
    ] + [
        Target(
            "object of 200 MB",
            "horovod",
            0.1,
            False,
            lambda figures: figures.seconds(small, "object"),
            ranks=2,
            unit="s",
        ),
        Target(
            "object of 200 MB: pkl5 / ours",
            "horovod",
            1.0,
            True,
            times(names.PKL5, small, "object"),
        ),
        Target(
            "object of 200 MB: Horovod / ours",
            "horovod",
            100.0,
            True,
            times(names.HOROVOD_OBJECT, small, "object"),
        ),
        Target(
            "commit to disk behind the training: ours / Horovod's in memory",
            "horovod",
            1 / 3,
            False,
            times(names.COMMIT_ASYNC, names.HOROVOD_COMMIT, "commit"),
        ),
    ]


_CUT = "distributed"
_SAME, _OTHER = "restore, same boxes", "restore, other boxes"


def _of_several(
    measure: Callable[[Figures], float | None],
) -> Callable[[Figures], float | None]:
    """Return a measure that leaves out one rank alone: nothing is cut there."""
    return lambda figures: measure(figures) if figures.ranks > 1 else None


def _read_once(ours: str, group: str) -> Callable[[Figures], float | None]:
    def measure(figures: Figures) -> float | None:
        figure = figures.find(ours, group)
        return ratio(figure.values.get("bytes_read"), figure.nbytes) if figure else None

    return measure


def _peak_of_any(name: str) -> Callable[[Figures], float | None]:
    def measure(figures: Figures) -> float | None:
        figure = figures.find(name, "peak")
        if figure is None:
            return None
        return max(figure.values[f"peak_bytes_{who}"] for who in ("root", "others")) / _MIB

    return measure


def _cut_saves() -> list[Target]:
    ours, dcp = names.SAVE_CUT, names.durable(names.DCP)
    rows = [
        (
            "best raw direct write / ours",
            0.9,
            _best_raw(names.RAW_OWN_WRITE, ours, "save"),
        ),
        (f"{dcp} / ours", 1.0, times(dcp, ours, "save")),
    ]
    return [
        Target(f"cut arrays, save: {what}", _CUT, bound, True, _of_several(measure))
        for what, bound, measure in rows
    ]


def _cut_restores() -> list[Target]:
    """Of arrays that are cut over the ranks, into the same boxes and into any others."""
    dcp, read = names.load(names.DCP), names.RAW_OWN_READ
    targets = []
    for what, ours, group, bound in (
        ("same boxes", names.RESTORE_SAME, _SAME, 0.9),
        ("rows into columns", names.RESTORE_OTHER, _OTHER, 0.8),
        ("rows into columns, half the ranks", names.RESTORE_FEWER, _OTHER, 0.8),
    ):
        raw, once = _best_raw(read, ours, group), _read_once(ours, group)
        title = f"cut arrays, restore, {what}"
        targets += [
            Target(
                f"{title}: best raw direct read / ours", _CUT, bound, True, _of_several(raw)
            ),
            Target(f"{title}: bytes read / saved", _CUT, _ONCE, False, _of_several(once)),
        ]
        if ours != names.RESTORE_FEWER:
            peer = _of_several(times(dcp, ours, group))
            targets.append(Target(f"{title}: {names.DCP} / ours", _CUT, 1.0, True, peer))
    sent = _of_several(
        lambda figures: figures.value(names.RESTORE_SAME, "bytes_sent", _SAME)
    )
    name = "cut arrays, restore, same boxes: bytes of tiles sent"
    return [*targets, Target(name, _CUT, 0, False, sent, unit="B")]


def _cut_peaks() -> list[Target]:
    rows = [
        ("save", names.SAVE_CUT),
        ("restore, same boxes", names.RESTORE_SAME),
        ("restore, rows into columns", names.RESTORE_OTHER),
    ]
    return [
        Target(
            f"cut arrays, peak memory of any rank: {what}",
            _CUT,
            128.0,
            False,
            _of_several(_peak_of_any(ours)),
            unit="MiB",
        )
        for what, ours in rows
    ]


def _plans() -> list[Target]:
    def measure(group: str) -> Callable[[Figures], float | None]:
        return lambda figures: figures.value(names.PLAN_RESTORE, "cpu_seconds", group)

    return [
        Target(
            f"plan of a restore, {group}: processor time",
            "plan",
            1.0,
            False,
            measure(group),
            ranks=1,  # root alone plans, with any number of them
            unit="s",
        )
        for group in (names.PLAN_LARGE, names.PLAN_SMALL)
    ]


TARGETS: tuple[Target, ...] = (
    Target(
        "save: best raw direct write / ours",
        "save",
        0.95,
        True,
        _best_raw(names.RAW_WRITE, names.SAVE),
    ),
    *_against_peers(),
    Target("stall: ours / memcpy", "stall", 1.1, False, times(names.STALL, names.MEMCPY)),
    Target(
        "stall with agreement over all ranks: ours / memcpy",
        "stall",
        1.3,
        False,
        times(names.STALL_SYNC, names.MEMCPY),
    ),
    Target(
        "stall of a local save / of an asynchronous save",
        "local",
        1.1,
        False,
        times(names.STALL_LOCAL, names.STALL_SYNC),
    ),
    Target(
        "training while hosts copy to the directory at half its rate / without",
        "drain",
        1.03,
        False,
        times(names.STEPS_COPIED, names.NO_SAVES),
    ),
    Target(
        "stall, overlapped: ours / memcpy",
        "stall",
        0.05,
        False,
        times(names.STALL_OVERLAP, names.MEMCPY),
    ),
    Target(
        "training, asynchronous save every 10 steps: throughput / without saves",
        "train",
        0.97,
        True,
        times(names.NO_SAVES, names.SAVE_ASYNC),
    ),
    Target(
        "training, a copy at every step: throughput / without",
        "train",
        0.95,
        True,
        times(names.NO_SAVES, names.COPIES),
    ),
    Target(
        "reporting of a save, all hooks and a timeline: share of the save",
        "observing",
        0.02,
        False,
        times(names.REPORTING, names.SAVE_UNSEEN, "reporting alone"),
    ),
    Target(
        "a step at which nothing is to be done",
        "step",
        50.0,
        False,
        _step_microseconds,
        ranks=4,
        unit="us",
    ),
    Target(
        "sync, equal: Horovod / ours",
        "sync",
        3.0,
        True,
        times(names.HOROVOD_SYNC, names.SYNC, "equal"),
    ),
    Target(
        "sync, equal: tensor bytes sent",
        "sync",
        0,
        False,
        lambda figures: figures.value(names.SYNC, "bytes_sent", "equal"),
        unit="B",
    ),
    Target(
        "sync, all differ: better of Bcast and Ibcast / ours",
        "sync",
        1.0,
        True,
        _sync_differing,
    ),
    Target(
        "sync, all differ, hosts: one hop / ours",
        "sync",
        0.9,
        True,
        times(names.ONE_HOP, names.SYNC, "all differ"),
        several_hosts=True,
    ),
    Target(
        "sync, all differ, hosts: Bcast / ours",
        "sync",
        1.8,
        True,
        times(names.BCAST, names.SYNC, "all differ"),
        several_hosts=True,
    ),
    Target(
        "second save, 1% changed: its time / full save",
        "reuse",
        0.20,
        False,
        times(names.REUSE_PART, names.REUSE_FULL),
    ),
    Target(
        "second save, 1% changed: bytes written / all bytes",
        "reuse",
        0.015,
        False,
        _share(names.REUSE_PART, "bytes_written"),
    ),
    Target(
        "restore: best raw direct read / ours",
        "restore",
        0.9,
        True,
        _best_raw(names.RAW_READ, names.RESTORE),
    ),
    Target(
        "restore: bytes read / bytes of the state",
        "restore",
        _ONCE,
        False,
        _share(names.RESTORE, "bytes_read"),
        ranks=4,
    ),
    Target(
        "restore: torch.load on every rank / ours",
        "restore",
        2.5,
        True,
        times(names.TORCH_LOAD, names.RESTORE),
    ),
    *_peaks(),
    *_beside_horovod(),
    *(
        Target(f"small leaves, {group}: many / one", "small", 2.0, False, _small(group))
        for group in ("save", "sync, equal", "sync, all differ", "restore")
    ),
    *_cut_saves(),
    *_cut_restores(),
    *_cut_peaks(),
    *_plans(),
)
"""In the order of the table."""


def evaluate(
    figures: Sequence[Figure], targets: Sequence[Target] = TARGETS
) -> list[Result]:
    """Return each target beside what was measured, once for each number of ranks.

    Of several runs the last one counts that has the case with those ranks and hosts.
    """
    last: dict[tuple[str, int, int], str] = {}
    for figure in figures:
        last[figure.case, figure.ranks, figure.hosts] = figure.run
    sets = {
        key: Figures(
            figure
            for figure in figures
            if (figure.case, figure.ranks, figure.hosts, figure.run) == (*key, run)
        )
        for key, run in last.items()
    }
    results: list[Result] = []
    for target in targets:
        found = [
            Result(target, some.ranks, some.hosts, target.measure(some))
            for (case, *_), some in sorted(sets.items(), key=lambda item: item[0])
            if case == target.case and target.applies(some)
        ]
        measured = [result for result in found if result.measured is not None]
        results += measured or [Result(target)]
    return results


def to_markdown(results: Sequence[Result]) -> str:
    """Return the table as markdown."""
    rows = [_COLUMNS, ("---", "---:", "---:", "---:", "---"), *(r.cells() for r in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_COLUMNS = ("figure", "ranks", "measured", "target", "")


def to_table(results: Sequence[Result]) -> Table:
    """Return the table for a terminal."""
    colours = {"met": "green", "missed": "red", "not measured": "dim"}
    table = Table()
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for result in results:
        table.add_row(*result.cells(), style=colours[result.verdict])
    return table


def main(argv: list[str]) -> None:
    """Print the targets beside the figures of a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks targets")
    parser.add_argument("figures", type=Path, nargs="+", help="JSON lines of the suite")
    parser.add_argument("--markdown", action="store_true", help="for a document")
    given = parser.parse_args(argv)
    figures: list[Figure] = []
    for path in given.figures:
        figures += read_figures(path.read_text().splitlines())
    results = evaluate(figures)
    if given.markdown:
        print(to_markdown(results))
    else:
        Console(width=120).print(to_table(results))


def _number(value: float, unit: str) -> str:
    text = re.sub(r"\.$", "", f"{value:.3g}")
    return f"{text} {unit}".strip()
