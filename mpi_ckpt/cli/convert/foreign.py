# SPDX-License-Identifier: Apache-2.0
"""Reads files of other tools, without trust in their contents.

The leaves of a safetensors file read their bytes one at a time, when they are written.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpi_ckpt.cli.convert.exporting import METADATA_KEY
from mpi_ckpt.errors import CorruptGenerationError, ReadError
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, Place, copy_bytes
from mpi_ckpt.state import Capture, LeafState, State
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.format.manifest_codec import MANIFEST_BYTES_MAX
from mpi_ckpt.storage.format.strict_json import read_json, shown
from mpi_ckpt.storage.format.tensorfile import parse_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from mpi_ckpt.state import Structure

# A manifest of its tensors must be readable too, and takes twice as much for a tensor.
_HEADER_BYTES_MAX = MANIFEST_BYTES_MAX // 2
_COPY_BYTES = 4 << 20
_SIZE_MAX = 1 << 60
_DIMENSIONS_MAX = 64
_RANKS_MAX = (1 << 31) - 1


class FixedState(LeafState):
    """A leaf state of given contents, which is saved and never restored."""

    def __init__(self, name: str, structure: Structure, leaves: Sequence[Leaf]) -> None:
        super().__init__(name)
        self._captured = Capture(structure, leaves)

    def capture(self) -> Capture:
        """See `LeafState`."""
        return self._captured


class FileStream(State):
    """A plain state whose stream is a range of a file."""

    def __init__(
        self, name: str, path: Path, offset: int = 0, most: int = _SIZE_MAX
    ) -> None:
        super().__init__(name)
        self._path, self._offset, self._most = path, offset, most

    def save(self, fileobj: BinaryIO) -> None:
        """Copy the range."""
        with filesystem.open_for_reading(self._path) as (descriptor, size):
            end = min(size, self._offset + self._most)
            window = memoryview(bytearray(_COPY_BYTES))
            for start in range(self._offset, end, _COPY_BYTES):
                into = window[: min(_COPY_BYTES, end - start)]
                count = filesystem.read_at(descriptor, into, start)
                fileobj.write(into[:count])


@dataclass(frozen=True, slots=True)
class Content:
    """The contents of a file.

    Attributes:
        states: States ready to save; None if the file does not describe them.
        leaves: All tensors by their names in the file.
        step: Training step, if the file gives it.
        size: Number of ranks, likewise.
        metrics: Likewise.
    """

    states: Sequence[State] | None
    leaves: Mapping[str, Leaf]
    step: int = 0
    size: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Content]:
    """Open a safetensors file; its leaves can be read within the block.

    Raises:
        CorruptGenerationError: If it is damaged.
        ReadError: If the operating system cannot read it.
    """
    with (
        os_errors_as(ReadError, "reading", path),
        filesystem.open_for_reading(path) as (descriptor, size),
    ):
        try:
            header, start = _read_header(descriptor, size)
            metadata = header.pop("__metadata__", {})
            leaves = _leaves(header, descriptor, start, size)
            content = _content(metadata, leaves, path)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            lacks = isinstance(error, KeyError)
            text = f"it lacks {shown(error.args[0])}" if lacks else str(error)
            raise CorruptGenerationError(
                f"{path} is no whole safetensors file: {text}", path=path
            ) from error
        yield content


class _FileBuffer:
    """The bytes of a leaf in a file; see `mpi_ckpt.leaf.Buffer`."""

    def __init__(self, descriptor: int, offset: int, nbytes: int) -> None:
        self.descriptor, self.offset, self.nbytes = descriptor, offset, nbytes

    def view(self) -> memoryview | None:
        return None

    def read(self) -> memoryview:
        data = memoryview(bytearray(self.nbytes))
        if filesystem.read_at(self.descriptor, data, self.offset) < self.nbytes:
            raise OSError("the file has become shorter")
        return data

    def copy_to(self, target: memoryview) -> None:
        copy_bytes(self.read(), target)

    def write(self, data: memoryview) -> None:
        raise NotImplementedError

    def stamp(self) -> int:
        return 0

    def place(self) -> Place | None:
        return None

    def span(self) -> tuple[int, int]:
        return 0, 0


def _read_header(descriptor: int, size: int) -> tuple[dict[str, Any], int]:
    length = bytearray(8)
    filesystem.read_at(descriptor, memoryview(length), 0)
    count = int.from_bytes(length, "little")
    if count > min(_HEADER_BYTES_MAX, size - 8):
        raise ValueError(f"a header of {count} bytes in a file of {size}")
    text = bytearray(count)
    filesystem.read_at(descriptor, memoryview(text), 8)
    return parse_header(bytes(text)), 8 + count


def _leaves(
    header: dict[str, Any], descriptor: int, start: int, size: int
) -> dict[str, Leaf]:
    leaves: dict[str, Leaf] = {}
    ends: list[tuple[int, int]] = []
    for name, entry in header.items():
        spec = _spec(name, entry["dtype"], entry["shape"])
        first, end = map(_length, entry["data_offsets"])
        if end - first != spec.nbytes or start + end > size:
            raise ValueError(f"{shown(name)} does not fit bytes {first} to {end}")
        ends.append((first, end))
        leaves[name] = Leaf(spec, _FileBuffer(descriptor, start + first, spec.nbytes))
    reached = 0
    # A small file could claim to hold its bytes a million times, or hide another file.
    for first, end in sorted(ends):
        if first != reached:
            raise ValueError(f"tensors overlap, or leave a hole, at {first}")
        reached = end
    if start + reached != size:
        raise ValueError(f"tensors end at {start + reached} of {size} bytes")
    return leaves


def _spec(name: Any, dtype: Any, shape: Any) -> LeafSpec:  # noqa: ANN401 (JSON)
    if (
        not isinstance(name, str)
        or not isinstance(dtype, str)
        or not dtypes.is_known(dtype)
    ):
        raise ValueError(f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    lengths = tuple(map(_length, shape))
    if len(lengths) > _DIMENSIONS_MAX:
        raise ValueError(f"tensor {shown(name)} has {len(lengths)} dimensions")
    return LeafSpec(name, dtype, lengths)


def _length(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _SIZE_MAX:
        raise ValueError(f"{shown(value)} where a length belongs")
    return value


def _content(metadata: Any, leaves: dict[str, Leaf], path: Path) -> Content:  # noqa: ANN401 (JSON)
    if not isinstance(metadata, dict):
        raise ValueError("the metadata is no object")  # noqa: TRY004 (bad bytes)
    if METADATA_KEY not in metadata:
        return Content(None, leaves)
    document = read_json(metadata[METADATA_KEY].encode())
    # A file of `LeafState.save` has other contents under the same key.
    if not isinstance(document, dict) or "states" not in document:
        return Content(None, leaves)
    states = [_state(entry, leaves, path) for entry in document["states"]]
    metrics = {str(k): float(v) for k, v in document["metrics"].items()}
    step, size = document["step"], _length(document["size"])
    if type(step) is not int or not 1 <= size <= _RANKS_MAX:
        raise ValueError(f"step {shown(step)} of {size} ranks")
    return Content(states, leaves, step, size, metrics)


def _state(entry: dict[str, Any], leaves: dict[str, Leaf], path: Path) -> State:
    if "stream" in entry:
        buffer = leaves[entry["stream"]].buffer
        assert isinstance(buffer, _FileBuffer)
        return FileStream(entry["name"], path, buffer.offset, buffer.nbytes)
    found = []
    for stored, name, dtype, shape in entry["leaves"]:
        spec, leaf = _spec(name, dtype, shape), leaves[stored]
        if spec.nbytes != leaf.spec.nbytes:
            raise ValueError(f"{shown(name)} does not fit {shown(stored)}")
        found.append(Leaf(spec, leaf.buffer))
    return FixedState(entry["name"], entry["structure"], found)
