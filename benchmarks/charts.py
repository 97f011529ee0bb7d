# SPDX-License-Identifier: Apache-2.0
"""How figures look: bars beside their limit, lines over ranks or sizes, light and dark."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from benchmarks.table import best_ceiling, describe_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from matplotlib.axes import Axes

    from benchmarks.harness import Figure

__all__ = ["DARK", "LIGHT", "Theme", "bars", "lines", "to_png"]

OURS = "mpi_ckpt"
_WIDTH_INCHES = 11.0
_PANELS_A_ROW = 2
_DOTS_PER_INCH = 144
# Heights that are further apart than this are drawn logarithmically.
_DECADES = 30

Point = tuple[float, float, float, float]
"""x, median, lower end, upper end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colors of a figure on a light or on a dark page."""

    page: str
    ink: str
    faint: str
    grid: str
    ours: str
    peer: str
    limit: str
    series: tuple[str, ...]


LIGHT = Theme(
    page="#ffffff",
    ink="#1d1d1b",
    faint="#66655f",
    grid="#e7e6e1",
    ours="#2a78d6",
    peer="#b5b3ab",
    limit="#d6492f",
    series=("#2a78d6", "#eb6834", "#1a9e6f", "#b98300", "#6d4fc4", "#d45d8c", "#7a7a73"),
)
DARK = Theme(
    page="#1a1a19",
    ink="#f2f1ec",
    faint="#a9a89f",
    grid="#353531",
    ours="#4f98ec",
    peer="#77766e",
    limit="#f0765d",
    series=("#4f98ec", "#f08a5d", "#35c792", "#e0a92f", "#a292f2", "#ee8fb3", "#a9a89f"),
)


def bars(
    title: str, panels: Mapping[str, Sequence[Figure]], unit: str, theme: Theme
) -> Canvas:
    """Draw a bar for each contender, a panel for each place.

    Args:
        title: What was measured.
        panels: Title of a panel and its figures.
        unit: What stands in their seconds: ``"seconds"``, or ``"bytes"`` instead.
        theme: The colors.
    """
    every = [figure for figures in panels.values() for figure in figures]
    names = _in_order(every)
    columns = min(_PANELS_A_ROW, len(panels))
    height = 0.36 * len(names) + 0.75
    canvas, grid = _canvas(title, len(panels), columns, height, theme)
    for (place, figures), axes in zip(panels.items(), grid, strict=True):
        _draw_bars(
            axes,
            place,
            {figure.contender: figure for figure in figures},
            names,
            unit,
            theme,
        )
    legend = [
        Patch(color=theme.ours, label=OURS),
        Patch(color=theme.peer, label="others"),
        Patch(facecolor=theme.page, edgecolor=theme.limit, label="raw limit"),
        Patch(
            facecolor=theme.page, edgecolor=theme.faint, hatch="////", label="not durable"
        ),
    ]
    shown = [
        any(_is_ours(figure) for figure in every),
        any(not figure.ceiling and not _is_ours(figure) for figure in every),
        any(figure.ceiling for figure in every),
        any(not figure.durable for figure in every),
    ]
    _legend(
        canvas, [p for p, is_shown in zip(legend, shown, strict=True) if is_shown], theme
    )
    return canvas


def _draw_bars(
    axes: Axes,
    place: str,
    figures: Mapping[str, Figure],
    names: Sequence[str],
    unit: str,
    theme: Theme,
) -> None:
    _title(axes, place, theme)
    longest = max(max(figure.seconds) for figure in figures.values()) or 1.0
    for row, name in enumerate(names):
        figure = figures.get(name)
        if figure is None:
            axes.text(
                0, row, "  not measured", va="center", fontsize=8.5, color=theme.faint
            )
            continue
        color = theme.ours if _is_ours(figure) else theme.peer
        low, high = figure.median - min(figure.seconds), max(figure.seconds) - figure.median
        axes.barh(
            row,
            figure.median,
            height=0.66,
            facecolor=theme.page if figure.ceiling else color,
            edgecolor=theme.limit if figure.ceiling else theme.page,
            linewidth=1.2 if figure.ceiling else 0,
            hatch="" if figure.durable else "////",
            xerr=[[low], [high]] if len(figure.seconds) > 1 else None,
            error_kw={"ecolor": theme.ink, "elinewidth": 1.1, "capsize": 2.5},
            zorder=2,
        )
        axes.text(
            max(figure.seconds) + 0.015 * longest,
            row,
            _label(figure, unit),
            va="center",
            fontsize=8.5,
            color=theme.ink,
            # The line of the limit must not run through it.
            bbox={"facecolor": theme.page, "linewidth": 0, "pad": 1.2},
            fontweight="bold" if _is_ours(figure) else "normal",
        )
    best = best_ceiling(list(figures.values()))
    if best is not None:
        axes.axvline(
            best, color=theme.limit, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.42 * longest)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    form = _seconds if unit == "seconds" else describe_bytes
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: form(x)))
    _dress(axes, theme, grid="x")


def _label(figure: Figure, unit: str) -> str:
    if unit == "bytes":
        return describe_bytes(figure.median)
    return f"{_seconds(figure.median)}  {describe_bytes(figure.nbytes / figure.median)}/s"


def lines(
    title: str,
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    over: str,
    unit: str,
    limits: Collection[str],
    theme: Theme,
) -> Canvas:
    """Draw a line for each contender, a panel for each place.

    Args:
        title: What was measured.
        panels: Title of a panel, its contenders and their points.
        over: What the points go over: ``"ranks"`` or ``"bytes"``.
        unit: Of their height: ``"seconds"`` or ``"GB/s"``.
        limits: Contenders that are raw limits.
        theme: The colors.
    """
    names = list(dict.fromkeys(name for found in panels.values() for name in found))
    names.sort(key=lambda name: not name.startswith(OURS))
    columns = min(_PANELS_A_ROW, len(panels))
    canvas, grid = _canvas(title, len(panels), columns, 3.6, theme)
    colors = {name: theme.series[i % len(theme.series)] for i, name in enumerate(names)}
    dashes: dict[str, Literal["-", "--"]]
    dashes = {name: "--" if name in limits else "-" for name in names}
    for (place, found), axes in zip(panels.items(), grid, strict=True):
        _title(axes, place, theme)
        for name, points in found.items():
            x, middle, low, high = zip(*sorted(points), strict=True)
            ours = name.startswith(OURS)
            axes.plot(
                x,
                middle,
                color=colors[name],
                linestyle=dashes[name],
                linewidth=2.4 if ours else 1.5,
                marker="o",
                markersize=5 if ours else 3.5,
                zorder=3 if ours else 2,
            )
            axes.fill_between(x, low, high, color=colors[name], alpha=0.13, linewidth=0)
    points = [p for found in panels.values() for ps in found.values() for p in ps]
    # Panels share their height: not before all are drawn.
    for axes in grid:
        _scale(axes, points, over, unit)
        _dress(axes, theme, grid="both")
    handles = [
        Line2D([], [], color=colors[n], linestyle=dashes[n], marker="o", lw=2, label=n)
        for n in names
    ]
    _legend(canvas, handles, theme)
    return canvas


def _scale(axes: Axes, points: Sequence[Point], over: str, unit: str) -> None:
    axes.set_xscale("log", base=2)
    if over == "ranks":
        places = sorted({point[0] for point in points})
        axes.set_xticks(places, [f"{place:g}" for place in places])
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _bytes(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    # From zero where that leaves something to see: then twice as high is twice as much.
    low, high = min(p[2] for p in points), max(p[3] for p in points)
    if high > _DECADES * low:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.05 * high)
    form = _seconds if unit == "seconds" else "{:g}".format
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: form(y)))
    axes.set_xlabel({"bytes": "size"}.get(over, over))
    first = axes.get_subplotspec()
    if unit != "seconds" and first is not None and first.is_first_col():
        axes.set_ylabel(unit)


def _canvas(
    title: str, count: int, columns: int, height: float, theme: Theme
) -> tuple[Canvas, list[Axes]]:
    rows = math.ceil(count / columns)
    canvas = Canvas(
        figsize=(_WIDTH_INCHES, rows * height + 0.95),
        facecolor=theme.page,
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1, hspace=0.03),
    )
    grid = canvas.subplots(rows, columns, squeeze=False, sharey=True)
    canvas.suptitle(
        title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=theme.ink
    )
    flat = [axes for row in grid for axes in row]
    for axes in flat[count:]:
        axes.remove()
    return canvas, flat[:count]


def _title(axes: Axes, text: str, theme: Theme) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=theme.faint, pad=8)


def _dress(axes: Axes, theme: Theme, grid: Literal["x", "both"]) -> None:
    axes.set_facecolor(theme.page)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(which="both", length=0, labelcolor=theme.ink, labelsize=9)
    axes.tick_params(axis="x", labelcolor=theme.faint)
    axes.xaxis.label.set(color=theme.faint, fontsize=9)
    axes.yaxis.label.set(color=theme.faint, fontsize=9)


def _legend(canvas: Canvas, handles: Sequence[Any], theme: Theme) -> None:
    canvas.legend(
        handles=list(handles),
        loc="outside lower left",
        ncols=min(4, max(1, len(handles))),
        frameon=False,
        fontsize=9,
        handlelength=3,
        labelcolor=theme.ink,
    )


def to_png(canvas: Canvas, theme: Theme) -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    with rc_context({"hatch.color": theme.faint, "hatch.linewidth": 0.7}):
        canvas.savefig(file, dpi=_DOTS_PER_INCH, facecolor=theme.page)
    return file.getvalue()


def _in_order(figures: Iterable[Figure]) -> list[str]:
    """Return the contenders: limits first, then ours, then others, each by its best."""
    best: dict[str, tuple[int, float]] = {}
    for figure in figures:
        kind = 0 if figure.ceiling else 1 if _is_ours(figure) else 2
        best[figure.contender] = min(
            best.get(figure.contender, (9, 0.0)), (kind, figure.median)
        )
    return sorted(best, key=lambda name: best[name])


def _is_ours(figure: Figure) -> bool:
    return figure.contender.startswith(OURS) and not figure.ceiling


def _seconds(value: float) -> str:
    if value >= 1 or value == 0:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"
