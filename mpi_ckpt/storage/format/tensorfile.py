# SPDX-License-Identifier: Apache-2.0
"""Writes and reads the safetensors format: a file's header, and a stream of leaves. Pure.

The format is that of the safetensors project: 8 bytes of little-endian header length, a
JSON object, the data. This package pads the header with spaces so that the data starts
aligned, which the format allows. A stream is such a file with the structure of a state
beside it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import CorruptGenerationError, SaveError
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.memory import round_up
from mpi_ckpt.storage.format.strict_json import as_spec, read_json, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import BinaryIO

    from mpi_ckpt.leaves.leaf import Leaf, LeafSpec

DATA_ALIGNMENT = 4096
HEADER_BYTES_MAX = 100_000_000
"""The safetensors package reads no larger header."""

_LENGTH_BYTES = 8


def encode_header(
    entries: Iterable[tuple[str, LeafSpec]], metadata: dict[str, str]
) -> bytes:
    """Return the header of a file whose data follows in this order without gaps.

    Not collective. Thread-safe.

    Args:
        entries: Name in the file and spec of each leaf.
        metadata: Free text for other tools.

    Returns:
        Length and JSON; their total length is a multiple of ``DATA_ALIGNMENT``.

    Raises:
        SaveError: On the calling rank, if the header would be too large to read.
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
        ValueError: On the calling rank, if it is not a JSON object, or one that the format
            does not allow: spaces before it, a duplicate tensor.
    """
    if not text.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    header: dict[str, Any] = read_json(text)
    return header


def write_leaves(fileobj: BinaryIO, structure: Any, leaves: Sequence[Leaf]) -> None:  # noqa: ANN401 (JSON)
    """Write leaves as a safetensors stream. Not collective.

    Args:
        fileobj: Open for writing bytes.
        structure: JSON values, which go into the stream's metadata.
        leaves: The leaves, written in this order.
    """
    fileobj.write(encode_form(structure, [leaf.spec for leaf in leaves]))
    fileobj.writelines(leaf.buffer.read() for leaf in leaves)


def encode_form(structure: Any, specs: Sequence[LeafSpec]) -> bytes:  # noqa: ANN401 (JSON)
    """Return the head of a stream of leaves: all before their bytes. Not collective.

    Args:
        structure: JSON values, which go into the stream's metadata.
        specs: Specs of the leaves, in the order of their bytes.
    """
    forms = [spec.to_json() for spec in specs]
    metadata = {"mpi_ckpt": json.dumps({"structure": structure, "leaves": forms})}
    entries = [(_header_name(spec.name), spec) for spec in specs]
    return encode_header(entries, metadata)


def read_form(fileobj: BinaryIO) -> tuple[Any, list[LeafSpec]]:
    """Read the structure that `write_leaves` wrote, and the specs of the leaves to come.

    Not collective. `fill_leaves` continues from here.

    Raises:
        CorruptGenerationError: On the calling rank, if the stream is damaged.
    """
    try:
        length = int.from_bytes(_read_exactly(fileobj, 8), "little")
        if length > HEADER_BYTES_MAX:
            raise ValueError(f"a header of {length} bytes")
        header = parse_header(_read_exactly(fileobj, length))
        content = read_json(header["__metadata__"]["mpi_ckpt"].encode())
        structure = content["structure"]
        return structure, [as_spec(*form) for form in content["leaves"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptGenerationError(
            f"the stream is not one that a leaf state wrote: {error}"
        ) from error


def fill_leaves(
    fileobj: BinaryIO, specs: Sequence[LeafSpec], leaves: Sequence[Leaf | None]
) -> None:
    """Read the bytes of the leaves into their destinations. Not collective.

    Args:
        fileobj: The file, at the position where `read_form` ended.
        specs: Specs from `read_form`.
        leaves: Destination of each leaf; None skips it.

    Raises:
        CorruptGenerationError: On the calling rank, if the stream is damaged.
    """
    for spec, leaf in zip(specs, leaves, strict=True):
        try:
            data = _read_exactly(fileobj, spec.nbytes)
        except ValueError as error:
            raise CorruptGenerationError(f"leaf {shown(spec.name)}: {error}") from error
        if leaf is not None:
            leaf.buffer.write(memoryview(data))


def _header_name(leaf: str) -> str:
    # One name in the header is not a tensor's.
    return f"{leaf}_" if leaf.startswith("__metadata__") else leaf


def _read_exactly(fileobj: BinaryIO, count: int) -> bytes:
    data = fileobj.read(count)
    if len(data) != count:
        raise ValueError(f"ends after {len(data)} of {count} bytes")
    return data
