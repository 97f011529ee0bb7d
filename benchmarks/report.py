# SPDX-License-Identifier: Apache-2.0
"""One HTML page with all figures in it: it asks no other file and no network."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from benchmarks.table import best_ceiling, describe_bytes, describe_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.harness import Figure

__all__ = ["Drawing", "to_html"]

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d1d1b; --faint: #66655f;
  --line: #e0dfd9; --ours: #2a78d6; --shade: #f6f5f1; }
@media (prefers-color-scheme: dark) { :root { --page: #1a1a19; --ink: #f2f1ec;
  --faint: #a9a89f; --line: #3a3a36; --ours: #6aa9f0; --shade: #232321; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem;
  background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .25rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { margin: .25rem 0 1rem; color: var(--faint); max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1rem; margin: 1rem 0; }
a { color: var(--ours); }
img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
th, td { padding: .35rem .75rem .35rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
tr.ours td { font-weight: 600; }
tr.limit td { color: var(--faint); }
details { background: var(--shade); border-radius: .5rem; padding: .6rem 1rem;
  margin: 1rem 0; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem;
  font-size: .875rem; margin: .75rem 0 .25rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
"""
_READING = (
    "Medians over the repeats, the slowest rank of each counting; whiskers reach from the "
    "fastest repeat to the slowest. The dashed line is the best raw limit of the same run: "
    "the same bytes with nothing around them. Compare within one panel only."
)
_COLUMNS = (
    "median s",
    "min",
    "max",
    "GB/s",
    "of the limit",
    "durable",
    "idle before",
    "noted",
)


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure, drawn.

    Attributes:
        name: Of its file, without the ending.
        case: The case it shows.
        group: What of the case.
        light: PNG for a light page.
        dark: PNG for a dark page.
        figures: The numbers in it; none if they stand beside another drawing.
    """

    name: str
    case: str
    group: str
    light: bytes
    dark: bytes
    figures: tuple[Figure, ...]


def to_html(drawings: Sequence[Drawing]) -> str:
    """Return the page."""
    figures = [figure for drawing in drawings for figure in drawing.figures]
    cases = list(dict.fromkeys(drawing.case for drawing in drawings))
    links = "".join(f'<a href="#{escape(case)}">{escape(case)}</a>' for case in cases)
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>mpi_ckpt benchmarks</title><style>{_STYLE}</style></head><body>",
        "<h1>mpi_ckpt benchmarks</h1>",
        f"<p>{_READING}</p>",
        f"<nav>{links}</nav>",
        *_machines(figures),
    ]
    for case in cases:
        parts.append(f'<h2 id="{escape(case)}">{escape(case)}</h2>')
        for drawing in drawings:
            if drawing.case == case:
                parts += _section(drawing)
    return "\n".join([*parts, "</body></html>\n"])


def _section(drawing: Drawing) -> list[str]:
    title = f"{drawing.case}: {drawing.group}" if drawing.group else drawing.case
    picture = (
        '<picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{_url(drawing.dark)}">'
        f'<img src="{_url(drawing.light)}" alt="{escape(title)}"></picture>'
    )
    parts = [f"<h3>{escape(drawing.group or drawing.case)}</h3>", picture]
    if drawing.figures:
        parts += ["<details><summary>numbers</summary>", *_tables(drawing.figures)]
        parts.append("</details>")
    return parts


def _tables(figures: Sequence[Figure]) -> list[str]:
    parts = []
    for title, found in _by_comparison(figures).items():
        best = best_ceiling(found)
        head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
        rows = "".join(_row(figure, best) for figure in found)
        parts.append(
            '<div class="wide"><table><thead>'
            f"<tr><th>{escape(title)}</th>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )
    return parts


def _row(figure: Figure, best: float | None) -> str:
    kind = (
        "limit"
        if figure.ceiling
        else "ours"
        if figure.contender.startswith("mpi_ckpt")
        else ""
    )
    cells = (
        escape(figure.contender),
        *(
            f"{value:.4g}"
            for value in (figure.median, min(figure.seconds), max(figure.seconds))
        ),
        f"{figure.nbytes / figure.median / 1e9:.3g}",
        f"{best / figure.median:.2f}" if best else "",
        "yes" if figure.durable else "no",
        f"{figure.idle_share:.0%}",
        escape(describe_values(figure.values)),
    )
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _by_comparison(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        hosts = f" on {figure.hosts} hosts" if figure.hosts > 1 else ""
        mpi = figure.machine.get("mpi", "")
        title = f"{describe_bytes(figure.nbytes)}, {figure.ranks} ranks{hosts}, {mpi}"
        found.setdefault(title.rstrip(", "), []).append(figure)
    return found


def _machines(figures: Iterable[Figure]) -> list[str]:
    """Return what the figures were measured with, once for each that differs."""
    described: dict[str, dict[str, Any]] = {}
    for figure in figures:
        facts = {"run": figure.run, "workload": figure.workload, **figure.machine}
        described.setdefault(repr(sorted(facts.items(), key=str)), facts)
    parts = []
    for facts in described.values():
        terms = "".join(
            f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
            for name, value in facts.items()
            if value not in (None, "")
        )
        title = escape(" · ".join(filter(None, (facts.get("mpi"), facts.get("run")))))
        parts.append(
            f"<details><summary>measured with {title}</summary><dl>{terms}</dl></details>"
        )
    return parts


def _url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
