# SPDX-License-Identifier: Apache-2.0
"""Shows figures as they come in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.harness import Figure

__all__ = ["best_ceiling", "describe_values", "show"]

_WIDTH = 130
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def show(figures: Sequence[Figure]) -> None:
    """Print the figures of a group, each beside the best ceiling of the same run."""
    first, best = figures[0], best_ceiling(figures)
    table = Table(
        title=f"{first.case}, {first.group}: {describe_bytes(first.nbytes)}, "
        f"{first.ranks} ranks on {first.hosts} host{'s' * (first.hosts > 1)}, "
        f"{first.machine.get('mpi', '')}, {first.idle_share:.0%} idle before"
    )
    table.add_column("")
    for column in ("median s", "min", "max", "GB/s", "of ceiling"):
        table.add_column(column, justify="right")
    for column in ("durable", "noted"):
        table.add_column(column)
    for figure in figures:
        table.add_row(
            figure.contender,
            f"{figure.median:.3g}",
            f"{min(figure.seconds):.3g}",
            f"{max(figure.seconds):.3g}",
            f"{figure.nbytes / figure.median / 1e9:.2f}",
            f"{best / figure.median:.2f}" if best else "",
            "yes" if figure.durable else "no",
            describe_values(figure.values),
        )
    Console(width=_WIDTH).print(table)


def best_ceiling(figures: Sequence[Figure]) -> float | None:
    """Return the seconds of the fastest raw limit among figures, if there is one."""
    return min((figure.median for figure in figures if figure.ceiling), default=None)


def describe_values(values: Mapping[str, float]) -> str:
    """Return what else was noted, without the phases, which are for the file."""
    noted = [
        f"{key.removeprefix('bytes_').replace('_', ' ')} {describe_bytes(value)}"
        for key, value in values.items()
        if "bytes" in key
    ]
    if "cpu_seconds" in values:
        noted.append(f"processor {values['cpu_seconds']:.3g} s")
    return ", ".join(noted)


def describe_bytes(nbytes: float) -> str:
    """Return a number of bytes in words."""
    for unit, name in _UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes:.0f} B"
