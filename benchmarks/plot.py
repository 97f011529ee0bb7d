# SPDX-License-Identifier: Apache-2.0
"""Figures from JSON lines: PNG files and one HTML report that stands alone.

python -m benchmarks plot figures.jsonl [more.jsonl] --out report
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from benchmarks.charts import DARK, LIGHT, bars, lines, to_png
from benchmarks.harness import Figure
from benchmarks.report import Drawing, to_html
from benchmarks.table import describe_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from matplotlib.figure import Figure as Canvas

    from benchmarks.charts import Theme

__all__ = ["draw_all", "main", "read_newest"]

Key = TypeVar("Key")

# A line needs so many points: two are better compared as bars.
_POINTS = 3
# What a figure about memory has noted, of root and of the others.
_PEAK = "peak_bytes_"


def read_newest(texts: Iterable[str]) -> list[Figure]:
    """Read JSON lines; of what was measured twice in one place the last one counts."""
    newest: dict[tuple[object, ...], Figure] = {}
    for text in texts:
        line = json.loads(text) if text.strip() else {}
        if not {"case", "contender", "ranks", "nbytes"} <= set(line) or not line["seconds"]:
            continue  # another command's, such as a count of messages
        figure = Figure.from_json(text)
        key = (
            figure.case,
            figure.group,
            figure.contender,
            place_of(figure),
            figure.nbytes,
            figure.workload,
        )
        newest.pop(key, None)
        newest[key] = figure
    return list(newest.values())


class Place(NamedTuple):
    """Where figures were measured that can be compared."""

    ranks: int
    hosts: int
    mpi: str

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks != 1)}"
        hosts = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        return ", ".join(filter(None, (ranks + hosts, self.mpi)))


def place_of(figure: Figure) -> Place:
    """Return where a figure was measured."""
    return Place(figure.ranks, figure.hosts, figure.machine.get("mpi", ""))


def draw_all(figures: Sequence[Figure]) -> list[Drawing]:
    """Return a drawing of each group, in the order in which they were measured."""
    drawings = []
    for case, of_case in _by(figures, lambda figure: figure.case).items():
        swept = [
            found
            for found in _by(
                of_case, lambda figure: (_family(figure), place_of(figure))
            ).values()
            if len({figure.nbytes for figure in found}) >= _POINTS
        ]
        in_sweeps = {id(figure) for found in swept for figure in found}
        rest = [figure for figure in of_case if id(figure) not in in_sweeps]
        for group, found in _by(rest, lambda figure: figure.group).items():
            drawings += _draw_group(case, group, found)
        flat = [figure for found in swept for figure in found]
        for family, found in _by(flat, _family).items():
            drawings.append(_draw_sweep(case, family, found))
    return drawings


def _draw_group(case: str, group: str, figures: Sequence[Figure]) -> list[Drawing]:
    panels = _by(
        figures, lambda figure: f"{place_of(figure)}, {describe_bytes(figure.nbytes)}"
    )
    title, unit = _title(case, group), "seconds"
    if all(_PEAK + "root" in figure.values for figure in figures):
        panels, unit = _peaks(panels), "bytes"
    drawings = [_draw(case, group, figures, partial(bars, title, panels, unit))]
    ranks = sorted({figure.ranks for figure in figures})
    if len(ranks) >= _POINTS:
        lines_of = {
            name: {
                contender: [(figure.ranks, *_seconds(figure)) for figure in found]
                for contender, found in _by(of_mpi, lambda figure: figure.contender).items()
            }
            for name, of_mpi in _by(figures, lambda o: o.machine.get("mpi", "")).items()
        }
        title = _title(case, group, "over ranks")
        make = partial(lines, title, lines_of, "ranks", "seconds", _limits(figures))
        drawings.append(_draw(case, f"{group} over ranks", (), make))
    return drawings


def _peaks(panels: Mapping[str, Sequence[Figure]]) -> dict[str, list[Figure]]:
    """Return panels of peaks of memory, of root and of the others, in place of seconds."""
    return {
        f"{who}: {place}": [
            replace(figure, seconds=(figure.values.get(_PEAK + who, 0.0),))
            for figure in found
        ]
        for place, found in panels.items()
        for who in ("root", "others")
    }


def _draw_sweep(case: str, family: str, figures: Sequence[Figure]) -> Drawing:
    panels = {
        place: {
            contender: [(figure.nbytes, *_gigabytes_a_second(figure)) for figure in found]
            for contender, found in _by(of_place, lambda figure: figure.contender).items()
        }
        for place, of_place in _by(figures, lambda figure: str(place_of(figure))).items()
    }
    title = _title(case, family, "over sizes")
    make = partial(lines, title, panels, "bytes", "GB/s", _limits(figures))
    return _draw(case, f"{family} over sizes", figures, make)


def _draw(
    case: str, group: str, figures: Sequence[Figure], make: Callable[[Theme], Canvas]
) -> Drawing:
    name = re.sub(r"[^a-z0-9]+", "-", f"{case} {group}".lower()).strip("-")
    light, dark = (to_png(make(theme), theme) for theme in (LIGHT, DARK))
    return Drawing(name, case, group, light, dark, tuple(figures))


def _title(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _limits(figures: Iterable[Figure]) -> set[str]:
    return {figure.contender for figure in figures if figure.ceiling}


def _seconds(figure: Figure) -> tuple[float, float, float]:
    return figure.median, min(figure.seconds), max(figure.seconds)


def _gigabytes_a_second(figure: Figure) -> tuple[float, float, float]:
    middle, least, most = (figure.nbytes / seconds / 1e9 for seconds in _seconds(figure))
    return middle, most, least


def _family(figure: Figure) -> str:
    """Return the group without the size in its name, if it has one."""
    return " ".join(re.sub(r"\d+( bytes)?", "", figure.group).split())


def _by(figures: Iterable[Figure], key: Callable[[Figure], Key]) -> dict[Key, list[Figure]]:
    found: dict[Key, list[Figure]] = defaultdict(list)
    for figure in figures:
        found[key(figure)].append(figure)
    return dict(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the figures and the report.

    Args:
        argv: The arguments behind ``plot``; None for those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot")
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines of the suite")
    parser.add_argument("--out", type=Path, default=Path("report"), help="made if missing")
    arguments = parser.parse_args(argv)
    texts = [line for file in arguments.files for line in file.read_text().splitlines()]
    figures = read_newest(texts)
    if not figures:
        parser.error("there is no figure in these files")
    drawings = draw_all(figures)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for drawing in drawings:
        (arguments.out / f"{drawing.name}.png").write_bytes(drawing.light)
    report = arguments.out / "report.html"
    report.write_text(to_html(drawings), encoding="utf-8")
    print(f"{len(drawings)} figures and {report}")


if __name__ == "__main__":
    main()
