# SPDX-License-Identifier: Apache-2.0
"""Makes text that a terminal only shows and never obeys; no MPI, no click, no rich.

Names of states, files, hosts and metrics, and all quotes in messages, are untrusted.
"""

from __future__ import annotations

import json
import math
import time
import unicodedata
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from mpi_ckpt.reports import bytes_text as bytes_text  # for users, as in the log

if TYPE_CHECKING:
    from collections.abc import Iterable

# Invisible, although Unicode counts them as letters and marks.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"
    + "".join(map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10))))
    + "".join(map(chr, range(0xE0100, 0xE01F0)))
)
# No script needs more marks on one letter; a hundred of them cover nearby lines.
_MARKS_MAX = 4
# 9999-12-31: the year of a date has four digits, and a manifest may hold any number.
_SECONDS_MAX = 253_402_300_799.0


def clean(text: object) -> str:
    """Return one line of text, with every character that is not simply visible escaped.

    These are control characters (line ends and tabs too), changes of writing direction,
    characters without width, line separators, tags, halves of surrogate pairs (bytes that
    are not text), and characters unknown to this Python's Unicode.
    """
    given = str(text)
    if given.isascii() and given.isprintable():
        return given
    shown: list[str] = []
    marks = _MARKS_MAX  # a leading mark would join the text before the name
    for character in given:
        kind = unicodedata.category(character)
        marks = marks + 1 if kind[0] == "M" else 0
        hidden = kind[0] == "C" or kind in ("Zl", "Zp") or character in _INVISIBLE
        if hidden or marks > _MARKS_MAX:
            character = character.encode("unicode_escape").decode()
        shown.append(character)
    return "".join(shown)


def json_text(value: dict[str, Any], *, indent: int | None = 2) -> str:
    """Return JSON in printable ASCII, which reads back to the same strings.

    Numbers that JSON lacks, such as infinity, become strings.
    """
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=indent, allow_nan=False)
    # The only control character that JSON leaves unescaped.
    return text.replace("\x7f", "\\u007f")


_AHEAD = "in future"


def age(then: float, now: float | None = None) -> str:
    """Return how long ago a time was, such as ``3 min``."""
    seconds = (time.time() if now is None else now) - then
    if seconds < 0:
        return _AHEAD
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def ago(then: float, now: float | None = None) -> str:
    """Return when a time was, such as ``3 min ago``."""
    text = age(then, now)
    return text if text == _AHEAD else f"{text} ago"


def iso_date(then: float) -> str:
    """Return a time in ISO 8601, such as ``2026-11-24T01:53:55Z``."""
    sane = min(max(then, 0.0), _SECONDS_MAX)
    return f"{datetime.fromtimestamp(sane, timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as ``1 leaf``."""
    many = noun[:-1] + "ves" if noun.endswith("leaf") else noun + "s"
    return f"{count} {noun if count == 1 else many}"


def listed(numbers: Iterable[int]) -> str:
    """Return numbers, such as ``1, 2``; ``none`` if there is none."""
    return ", ".join(map(str, numbers)) or "none"


def _finite(value: Any) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    lost = isinstance(value, float) and not math.isfinite(value)
    return str(value) if lost else value
