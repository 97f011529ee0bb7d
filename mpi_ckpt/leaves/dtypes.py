# SPDX-License-Identifier: Apache-2.0
"""Defines the names and sizes of the element types that a leaf can have.

The names are those of the safetensors format. A type that the format lacks is stored as
``U8`` with one more dimension; the manifest keeps the real name (docs/format.md).
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = [
    *("FLOATING", "Record", "RecordField", "element_bytes", "encode_record", "is_known"),
    *("nbytes", "parse_record", "stored_form"),
]

_SAFETENSORS_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

# Types that some or all safetensors readers do not know.
_OTHER_BYTES = {
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "F4_X2": 1,
    "C32": 4,
    "C64": 8,
    "C128": 16,
}

# NumPy's long doubles, dates and fixed-width strings, under NumPy's own type strings.
# Elements of width zero are left out: no shape would give their number.
_NUMPY_NAME = re.compile(
    r"numpy:(?:<[fcmMU]|\|[SV])([1-9][0-9]{0,5})(?:\[[0-9a-zA-Z]{1,8}\])?"
)
# Types of a field of a record: also numbers, in either byte order.
_FIELD = re.compile(
    r"(?:[<>][iufcmMU]|\|[biuSV])([1-9][0-9]{0,5})(?:\[[0-9a-zA-Z]{1,8}\])?"
)
_RECORD = "numpy:{"
_RECORD_BYTES_MAX = 1 << 24
_FIELDS_MAX = 4096
_DEPTH_MAX = 8

FLOATING = frozenset({"F64", "F32", "F16", "BF16", "C32", "C64", "C128"})
"""Types that ``sync="mean"`` averages: those with a precision that an average keeps."""


def is_known(dtype: str) -> bool:
    """Return whether a manifest may contain a dtype name. Not collective. Thread-safe."""
    try:
        return element_bytes(dtype) > 0
    except KeyError:
        return False


def element_bytes(dtype: str) -> int:
    """Return the size of one element in bytes.

    Not collective. Thread-safe.

    Args:
        dtype: A name for which `is_known` holds.

    Raises:
        KeyError: On the calling rank, if the name is unknown.
    """
    size = _SAFETENSORS_BYTES.get(dtype) or _OTHER_BYTES.get(dtype)
    if size is not None:
        return size
    if dtype.startswith(_RECORD):
        return parse_record(dtype).nbytes
    match = _NUMPY_NAME.fullmatch(dtype)
    if match is None:
        raise KeyError(dtype)
    return _width(dtype.removeprefix("numpy:"), int(match[1]))


def stored_form(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and shape under which safetensors readers see a leaf.

    Not collective. Thread-safe.

    Args:
        dtype: A known name.
        shape: Shape in elements.
    """
    if dtype in _SAFETENSORS_BYTES:
        return dtype, shape
    width = element_bytes(dtype)
    return "U8", (*shape, width) if width > 1 else shape


@lru_cache(maxsize=4096)
def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a leaf in bytes. Not collective. Thread-safe."""
    return math.prod(shape) * element_bytes(dtype)


class RecordField(NamedTuple):
    """One field of a record: its type is a type string of NumPy, or another record.

    Attributes:
        name: Name of the field.
        type: Its element type.
        shape: Shape of the subarray in each record; ``()`` for one element.
        offset: Where it starts in the record, in bytes.
    """

    name: str
    type: str | Record
    shape: tuple[int, ...]
    offset: int


class Record(NamedTuple):
    """The layout of a structured element: size in bytes, and its fields."""

    nbytes: int
    fields: tuple[RecordField, ...]


def encode_record(record: Record) -> str:
    """Return the dtype name of a record. Not collective. Thread-safe."""
    return "numpy:" + json.dumps(
        _to_json(record), separators=(",", ":"), ensure_ascii=False
    )


@lru_cache(maxsize=256)
def parse_record(dtype: str) -> Record:
    """Return the record whose name `encode_record` made.

    Not collective. Thread-safe.

    Raises:
        KeyError: On the calling rank, if the text is not such a name.
    """
    try:
        record = _from_json(json.loads(dtype.removeprefix("numpy:")), 0)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise KeyError(dtype) from None
    if encode_record(record) != dtype:
        raise KeyError(dtype)
    return record


def _to_json(record: Record) -> dict[str, Any]:
    fields = [
        [field.name, _to_json(field.type) if isinstance(field.type, Record) else field.type,
         list(field.shape), field.offset]
        for field in record.fields
    ]  # fmt: skip
    return {"bytes": record.nbytes, "fields": fields}


def _from_json(values: Any, depth: int) -> Record:  # noqa: ANN401 (JSON)
    nbytes, fields = values["bytes"], values["fields"]
    if type(nbytes) is not int or not 0 < nbytes <= _RECORD_BYTES_MAX or depth > _DEPTH_MAX:
        raise ValueError
    if not 0 < len(fields) <= _FIELDS_MAX:
        raise ValueError
    made = []
    for name, kind, shape, offset in fields:
        inner: str | Record = kind if isinstance(kind, str) else _from_json(kind, depth + 1)
        width = inner.nbytes if isinstance(inner, Record) else _field_width(inner)
        if not all(type(n) is int and n > 0 for n in (*shape, offset + 1)):
            raise ValueError
        if type(name) is not str or offset + math.prod(shape) * width > nbytes:
            raise ValueError
        made.append(RecordField(name, inner, tuple(shape), offset))
    if len({field.name for field in made}) != len(made):
        raise ValueError
    return Record(nbytes, tuple(made))


def _field_width(kind: str) -> int:
    match = _FIELD.fullmatch(kind)
    if match is None:
        raise ValueError
    return _width(kind, int(match[1]))


def _width(kind: str, count: int) -> int:
    return 4 * count if kind[1] == "U" else count
