# SPDX-License-Identifier: Apache-2.0
"""Reads strict JSON (RFC 8259) from untrusted bytes. Pure.

Python's reader accepts other encodings, duplicate keys (the last one wins), NaN, halves of
surrogate pairs and, in old versions, integers that take hours to convert.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from reprlib import Repr
from typing import Any

# Python converts 4300 digits, and in some versions any number, in quadratic time.
_DIGITS_MAX = 4000
_SAMPLE_STEP = 100
_LONG_ROW = re.compile(rf"\d{{{_DIGITS_MAX // _SAMPLE_STEP}}}")
# A lone surrogate can only be written as an escape, which this package never writes.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_brief = Repr()
_brief.maxstring = _brief.maxother = 250


def shown(value: object) -> str:
    """Return a value from a file for a message: short, on one line, whatever it is.

    Not collective. Thread-safe.
    """
    return _brief.repr(value)


def read_json(data: bytes | bytearray) -> Any:  # noqa: ANN401 (JSON)
    """Return the value that bytes hold.

    Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if they are not strict JSON, or nested deeper than
            Python can read.
    """
    text = data.decode()
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            # Calling it for each of thousands of numbers takes a quarter of the time.
            parse_int=_short_int if _may_have_long_integer(text) else None,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _SURROGATE.search(text):
        _require_text(value)
    return value


def _require_text(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which is no text") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {shown(twice)} twice")
    return result


def _may_have_long_integer(text: str) -> bool:
    """Return whether a text may have more digits in a row than are allowed."""
    # Every hundredth character is looked at, of which such a row has as many in a row.
    return _LONG_ROW.search(text[::_SAMPLE_STEP]) is not None


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is not JSON")


def _short_int(digits: str) -> int:
    if len(digits) > _DIGITS_MAX:
        raise ValueError(f"it holds an integer of {len(digits)} digits")
    return int(digits)
