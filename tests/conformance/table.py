# SPDX-License-Identifier: Apache-2.0
"""The page that says what comes back and what is refused, made of the verdicts."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import torch

from tests.conformance.element_cases import element_cases
from tests.conformance.module_cases import module_cases
from tests.conformance.optimizer_cases import optimizer_cases
from tests.conformance.scheduler_cases import scheduler_cases
from tests.conformance.subjects import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.conformance.subjects import Case

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
COMMAND = "python -m tests.conformance"

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "optimizers": optimizer_cases,
    "schedulers": scheduler_cases,
    "modules": module_cases,
    "elements": element_cases,
}
VERSIONS = (
    f"torch {torch.__version__.partition('+')[0]}, NumPy {np.__version__}, "
    f"ml_dtypes {ml_dtypes.__version__}"
)
HEAD = f"""# Conformance

This page lists the objects with which torch tests itself, and every element type of NumPy
and torch. Each was saved, restored into a fresh object and compared bit for bit, then
compared again after one more step. A value either comes back exactly, or mpi_ckpt refuses
it by name, at the first save or before a restore moves a byte. Nothing comes back altered.

`{COMMAND}` made this page with {VERSIONS}.
One test fails if the page differs from the command's output. Another saves and restores
all objects with several ranks (`tests/conformance`).
"""


def verdicts() -> dict[Case, str | None]:
    """Return for each case the words of its refusal, or None where it comes back."""
    return {case: refusal(case) for make in CASES.values() for case in make()}


def page(found: Mapping[Case, str | None]) -> str:
    groups: dict[str, dict[Case, str | None]] = defaultdict(dict)
    for case, words in found.items():
        groups[case.group][case] = words
    parts = [HEAD]
    for group, cases in groups.items():
        parts.append(chapter(group, cases))
    return "\n".join(parts)


def chapter(group: str, cases: Mapping[Case, str | None]) -> str:
    """Return what comes back, things with the same forms in one line, and what does not."""
    forms: dict[str, list[str]] = defaultdict(list)
    verdict: dict[str | None, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for case, words in cases.items():
        forms[case.what].append(case.form)
        verdict[words and reason(words)][case.what].append(case.form)
    back = verdict.pop(None, {})
    lines = [
        f"## {group}",
        "",
        f"{sum(map(len, back.values()))} of {len(cases)} come back exactly.",
    ]
    if not group.startswith("Elements"):
        counted = [f"{name} ({len(found)})" for name, found in sorted(back.items())]
        lines += [f"Classes (and configurations tried): {', '.join(counted)}.", ""]
    else:
        lines += [f"Forms tried: {', '.join(dict.fromkeys(chain(*forms.values())))}.", ""]
        lines += ["| elements | forms | result |", "|---|---|---|"]
        lines += _rows(back, forms, "come back")
    for words, what in verdict.items():
        lines += _rows(what, forms, f"refused: {words}")
    return "\n".join([*lines, ""])


def reason(words: str) -> str:
    """Return the words of a refusal, without what differs between two with one reason."""
    words = re.sub(r"^state 'subject' cannot be saved:\s*", "", words)
    words = re.sub(r"dtype (\[.*\]|\S+) (cannot|has)", r"dtype … \2", words)
    words = re.sub(r"of torch\.\w+ cannot", "of torch.… cannot", words)
    words = re.sub(r"\(torch\.\w+, torch\.\w+, \w+\)", "(…)", words)
    return " ".join(words.split())


def _rows(
    what: Mapping[str, list[str]], forms: Mapping[str, list[str]], verdict: str
) -> Iterator[str]:
    """Give a line for each set of forms that several elements have."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, found in what.items():
        alike["all" if found == forms[name] else ", ".join(found)].append(name)
    for found, names in alike.items():
        yield f"| {', '.join(names)} | {found} | {verdict.replace('|', chr(92) + '|')} |"
