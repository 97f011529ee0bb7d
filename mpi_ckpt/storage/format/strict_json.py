# SPDX-License-Identifier: Apache-2.0
"""Reads strict JSON (RFC 8259), and values of given kinds, from untrusted bytes. Pure.

Python's reader accepts other encodings, duplicate keys (the last one wins), NaN, numbers
beyond every float, halves of surrogate pairs and, in old versions, integers that take hours
to convert.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from reprlib import Repr
from typing import Any

from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.digest import DIGEST_BYTES, Digest
from mpi_ckpt.leaves.leaf import LeafSpec

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
            parse_float=_finite,
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


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {shown(digits)} is out of range")
    return value


def _short_int(digits: str) -> int:
    if len(digits) > _DIGITS_MAX:
        raise ValueError(f"it holds an integer of {len(digits)} digits")
    return int(digits)


SIZE_MAX = 1 << 60
"""Largest offset, length in bytes, and length of a dimension in elements."""


def as_integer(value: object, most: int, least: int = 0) -> int:
    """Return an integer from ``least`` to ``most``. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, for any other value; ``true`` is not 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{shown(value)} is no integer")  # noqa: TRY004 (bad bytes)
    if not least <= value <= most:
        raise ValueError(f"{shown(value)} is out of range: {least} to {most}")
    return value


def as_real(value: object) -> float:
    """Return a finite number. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, for any other value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{shown(value)} is no number")  # noqa: TRY004 (bad bytes)
    try:
        real = float(value)
    except OverflowError:  # an integer too large for a float
        real = math.inf
    if not math.isfinite(real):
        raise ValueError(f"the number {shown(value)} is out of range")
    return real


def as_list(value: object) -> list[Any]:
    """Return a list of any values. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, for any other value.
    """
    if not isinstance(value, list):
        raise ValueError(f"{shown(value)} is no list")  # noqa: TRY004 (bad bytes)
    return value


def as_text(value: object) -> str:
    """Return a text. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, for any other value.
    """
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is no text")  # noqa: TRY004 (bad bytes)
    return value


def as_shape(value: object, dimensions: int = 64) -> tuple[int, ...]:
    """Return a shape, or an offset. Not collective. Thread-safe.

    Args:
        value: The list of lengths.
        dimensions: Largest number of dimensions; NumPy's arrays have at most 64.

    Raises:
        ValueError: On the calling rank, for any other value.
    """
    lengths = as_list(value)
    if len(lengths) > dimensions:  # counted first: a million cost a second to look at
        raise ValueError(f"{len(lengths)} dimensions, at most {dimensions} are possible")
    return tuple([as_integer(length, SIZE_MAX) for length in lengths])


def as_spec(name: object, dtype: object, shape: object) -> LeafSpec:
    """Return the spec of a leaf. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if a value is of a wrong kind or the dtype unknown.
    """
    text, kind = as_text(name), as_text(dtype)
    if not dtypes.is_known(kind):
        raise ValueError(f"leaf {shown(text)} has the unknown dtype {shown(kind)}")
    return LeafSpec(text, kind, as_shape(shape))


def as_hash(value: object) -> bytes:
    """Return the 16 bytes of one xxh3-128. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, for any other value.
    """
    digest = bytes.fromhex(as_text(value))
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"{shown(value)} is no digest")
    return digest


def as_digest(whole: object, blocks: object, nbytes: int, block_bytes: int) -> Digest:
    """Return the digest of a run of bytes. Not collective. Thread-safe.

    Args:
        whole: The digest, as hexadecimal text.
        blocks: The digests of its blocks in a row, as text; of a single block ``whole``.
        nbytes: Length of the run in bytes.
        block_bytes: Block length in bytes.

    Raises:
        ValueError: On the calling rank, if there are more or fewer digests than blocks, or
            ``whole`` is not theirs.
    """
    expected, joined = as_hash(whole), bytes.fromhex(as_text(blocks))
    if len(joined) != max(1, -(-nbytes // block_bytes)) * DIGEST_BYTES:
        raise ValueError("wrong number of blocks")
    cuts = range(0, len(joined), DIGEST_BYTES)
    digest = Digest(tuple([joined[cut : cut + DIGEST_BYTES] for cut in cuts]))
    if digest.whole != expected:
        raise ValueError("block digests do not match")
    return digest
