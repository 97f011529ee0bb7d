# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file: pure functions, no I/O.

The format is that of the safetensors project: 8 bytes of little-endian header length, a
JSON object, the data. Ours is padded with spaces so that the data starts aligned, which
the format allows.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mpi_ckpt import dtypes
from mpi_ckpt.errors import SaveError
from mpi_ckpt.memory import round_up
from mpi_ckpt.storage.strict_json import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mpi_ckpt.leaf import LeafSpec

__all__ = ["DATA_ALIGNMENT", "HEADER_BYTES_MAX", "encode_header", "parse_header"]

DATA_ALIGNMENT = 4096
HEADER_BYTES_MAX = 100_000_000
"""The safetensors package reads no larger header."""

_LENGTH_BYTES = 8


def encode_header(
    entries: Iterable[tuple[str, LeafSpec]], metadata: dict[str, str]
) -> bytes:
    """Return the header of a file whose data follows in this order without holes.

    Not collective. Thread-safe.

    Args:
        entries: Name in the file and spec of each leaf.
        metadata: Free text for other tools.

    Returns:
        Length and JSON; the length of it all is a multiple of ``DATA_ALIGNMENT``.

    Raises:
        SaveError: On the calling rank, if the header would be too large to be read.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, spec in entries:
        dtype, shape = dtypes.stored_form(spec.dtype, spec.shape)
        end = offset + spec.nbytes
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    total = round_up(_LENGTH_BYTES + len(text), DATA_ALIGNMENT)
    if total > HEADER_BYTES_MAX:
        raise SaveError(
            f"the names of all leaves take {len(text)} bytes, safetensors files hold "
            f"at most {HEADER_BYTES_MAX}; nothing was published"
        )
    length = total - _LENGTH_BYTES
    return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


def parse_header(text: bytes) -> dict[str, Any]:
    """Return the JSON object of a header without its length.

    Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if it is no JSON object, or one that the format
            does not allow: spaces before it, a tensor twice.
    """
    if not text.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    header: dict[str, Any] = read_json(text)
    return header
