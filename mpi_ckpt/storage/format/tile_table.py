# SPDX-License-Identifier: Apache-2.0
"""Lays out a file of tiles, and encodes and decodes the table of tiles in its header. Pure.

A file of tiles is an ordinary safetensors file, so any tool can read single tiles. The
metadata of its header lists the leaves and, in file order, the offset and the digests of
each tile (docs/format.md). The manifest has the digest of the header: it proves the table,
and the table proves the bytes. So the manifest does not grow with the number of tiles.

Digests have a fixed length, and the number of blocks follows from the size of a tile. The
length of the header is therefore known before the first byte of data is: a writer leaves
room for the header, digests the data while it writes, and writes the header last.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import SaveError
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.digest import BLOCK_BYTES, DIGEST_BYTES, Digest
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.storage.format.manifest import Extent, StoredLeaf, StoredTile
from mpi_ckpt.storage.format.strict_json import (
    SIZE_MAX,
    as_digest,
    as_integer,
    as_list,
    as_shape,
    as_spec,
    as_text,
    read_json,
    shown,
)
from mpi_ckpt.storage.format.tensorfile import encode_header, parse_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mpi_ckpt.storage.format.manifest import StoredFile

TABLE_BYTES_MAX = 64 << 20
"""Largest header of a file of tiles: names some 300,000 of them (docs/security.md)."""

_FORMAT = "mpi_ckpt"
_LEAVES = "mpi_ckpt.leaves"
_TILES = "mpi_ckpt.tiles"
_LENGTH_BYTES = 8
_ADVICE = (
    "Join small arrays into larger ones, or use more ranks; with Options(writers='node'), "
    "writers='all' gives each rank a file of its own"
)


class TileEntry(NamedTuple):
    """One tile to write.

    Attributes:
        state: Name of its state.
        spec: Name, type and shape of the whole leaf.
        box: The tile's box in the leaf; it has elements.
    """

    state: str
    spec: LeafSpec
    box: Box

    @property
    def nbytes(self) -> int:
        """Length of the tile in bytes."""
        return dtypes.nbytes(self.spec.dtype, self.box.shape)


@dataclass(frozen=True, slots=True)
class TileFilePlan:
    """The layout of a file of tiles. Everything but ``entries`` is in file order.

    Attributes:
        entries: The tiles, as given to `plan_tile_file`.
        order: The index into ``entries`` of each tile.
        offsets: Offset of each tile in the file, in bytes.
        header_bytes: Length of the header, a multiple of 4096.
        nbytes: Length of the file in bytes.
        block_bytes: Block length of the digests, in bytes.
    """

    entries: tuple[TileEntry, ...]
    order: tuple[int, ...]
    offsets: tuple[int, ...]
    header_bytes: int
    nbytes: int
    block_bytes: int = BLOCK_BYTES

    def encode(self, digests: Sequence[Digest]) -> bytes:
        """Return the header, of exactly ``header_bytes`` bytes.

        Not collective. Thread-safe.

        Args:
            digests: The digest of each tile, in file order.
        """
        return _encode([self.entries[number] for number in self.order], digests)


def plan_tile_file(
    entries: Sequence[TileEntry],
    block_bytes: int = BLOCK_BYTES,
    *,
    advice: str = _ADVICE,
) -> TileFilePlan:
    """Lay out tiles in one file. Not collective. Thread-safe.

    Tiles with larger elements come first, so that every tile is aligned to its element
    size; otherwise the order is that of ``entries``.

    Args:
        entries: The tiles; no two overlap.
        block_bytes: Block length of the digests, in bytes.
        advice: What the user can do if there are too many tiles for one file.

    Raises:
        SaveError: On the calling rank, if the header would be too large to read.
        ValueError: On the calling rank, if a tile is empty or lies outside its leaf, or two
            begin at the same element.
    """
    for entry in entries:
        _check_box(entry.spec, entry.box)
    order = file_order(entries)
    ordered = [entries[number] for number in order]
    header = _encode(ordered, [_no_digest(one.nbytes, block_bytes) for one in ordered])
    if len(header) > TABLE_BYTES_MAX:
        raise SaveError(
            f"{len(entries)} tiles in one file need a header of {len(header)} bytes, "
            f"readers take at most {TABLE_BYTES_MAX}; nothing was published. {advice}"
        )
    *offsets, end = accumulate((one.nbytes for one in ordered), initial=len(header))
    return TileFilePlan(
        tuple(entries), tuple(order), tuple(offsets), len(header), end, block_bytes
    )


def file_order(entries: Sequence[TileEntry]) -> list[int]:
    """Return the index of each tile in the order of a file. Not collective. Thread-safe."""
    widths = [-dtypes.element_bytes(entry.spec.dtype) for entry in entries]
    return sorted(range(len(entries)), key=widths.__getitem__)


def tile_name(state: str, leaf: str, offset: Iterable[int]) -> str:
    """Return the name of a tile in its file. Not collective. Thread-safe."""
    return f"{quote(state, safe='')}/{leaf}@{','.join(map(str, offset))}"


def decode_tile_header(
    header: bytes, file: StoredFile, block_bytes: int
) -> list[tuple[str, LeafSpec, StoredTile]]:
    """Read the table of a file of tiles; a forged table cannot lead outside the file.

    Not collective. Thread-safe. That the tiles of all files make up the leaves is not
    checked here.

    Args:
        header: The file's first ``header_bytes`` bytes.
        file: Its entry in the manifest.
        block_bytes: Block length of the generation, in bytes.

    Returns:
        State, spec of the whole leaf, and the tile, in file order.

    Raises:
        ValueError: On the calling rank, if a rule of the format is broken.
    """
    try:
        return _decode(header, file, block_bytes)
    except KeyError as error:
        raise ValueError(f"the header lacks {shown(error.args[0])}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the header has a value of a wrong kind: {error}") from error


def _encode(ordered: Sequence[TileEntry], digests: Sequence[Digest]) -> bytes:
    numbers: dict[tuple[str, LeafSpec], int] = {}
    tensors, tiles = [], []
    for entry, digest in zip(ordered, digests, strict=True):
        state, spec, box = entry
        leaf = numbers.setdefault((state, spec), len(numbers))
        blocks = b"".join(digest.blocks).hex() if len(digest.blocks) > 1 else ""
        tiles.append([leaf, box.offset, digest.whole.hex(), blocks])
        name = tile_name(state, spec.name, box.offset)
        tensors.append((name, LeafSpec(name, spec.dtype, box.shape)))
    if len({name for name, _ in tensors}) < len(tensors):
        raise ValueError("two tiles of a leaf begin at the same element")
    leaves = [[state, *spec.to_json()] for state, spec in numbers]
    metadata = {"format": _FORMAT, _LEAVES: _json(leaves), _TILES: _json(tiles)}
    return encode_header(tensors, metadata)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _no_digest(nbytes: int, block_bytes: int) -> Digest:
    """Return a digest of zeros, whose text is as long as that of the digest to come."""
    return Digest((bytes(DIGEST_BYTES),) * max(1, -(-nbytes // block_bytes)))


def _check_box(spec: LeafSpec, box: Box) -> None:
    if len(box.offset) != len(spec.shape) or len(box.shape) != len(spec.shape):
        raise ValueError(f"leaf {shown(spec.name)} has a tile of other dimensions")
    inside = all(e <= n for e, n in zip(box.end, spec.shape, strict=True))
    if not inside or min(box.offset, default=0) < 0:
        raise ValueError(
            f"leaf {shown(spec.name)}: tile {box} lies outside of {shown(spec.shape)}"
        )
    # A tile without elements would have the name of the next tile.
    if min(box.shape, default=1) < 1:
        raise ValueError(f"leaf {shown(spec.name)}: tile {box} has no elements")


def _decode(
    header: bytes, file: StoredFile, block_bytes: int
) -> list[tuple[str, LeafSpec, StoredTile]]:
    tensors = _parse(header)
    metadata = tensors.pop("__metadata__")
    leaves = [
        (as_text(state), as_spec(name, dtype, shape))
        for state, name, dtype, shape in _rows(metadata[_LEAVES])
    ]
    if len({(state, spec.name) for state, spec in leaves}) != len(leaves):
        raise ValueError("the header lists a leaf twice")
    tiles, end = [], file.header_bytes
    for number, offset, whole, blocks in _rows(metadata[_TILES]):
        state, spec = leaves[as_integer(number, len(leaves) - 1)]
        start = as_shape(offset)
        name = tile_name(state, spec.name, start)
        try:
            own, extent = _tensor(name, spec, tensors.pop(name), file, end)
            digest = as_digest(whole, as_text(blocks) or whole, extent.nbytes, block_bytes)
            box = Box(start, own.shape)
            _check_box(spec, box)
        except ValueError as error:
            raise ValueError(f"tile {shown(name)}: {error}") from None
        tiles.append((state, spec, StoredTile(box, StoredLeaf(own, extent, digest))))
        end += extent.nbytes
    if tensors:
        raise ValueError(f"the header lists {shown(next(iter(tensors)))}, the table not")
    if end != file.nbytes:
        raise ValueError(f"its tiles end at {end} of {file.nbytes} bytes")
    return tiles


def _parse(header: bytes) -> dict[str, Any]:
    if len(header) > TABLE_BYTES_MAX:
        raise ValueError(f"{len(header)} bytes are no header of tiles")
    length = int.from_bytes(header[:_LENGTH_BYTES], "little")
    if length != len(header) - _LENGTH_BYTES:
        raise ValueError(f"its header has {length} bytes by its own length")
    return parse_header(header[_LENGTH_BYTES:])


def _rows(text: object) -> list[Any]:
    return as_list(read_json(as_text(text).encode()))


def _tensor(
    name: str, spec: LeafSpec, entry: dict[str, Any], file: StoredFile, expected: int
) -> tuple[LeafSpec, Extent]:
    """Return form and extent of a tile from the header's own entry of the tensor."""
    first, last = [as_integer(one, SIZE_MAX) for one in as_list(entry["data_offsets"])]
    stored = as_text(entry["dtype"]), as_shape(entry["shape"], len(spec.shape) + 1)
    own = LeafSpec(name, spec.dtype, stored[1][: len(spec.shape)])
    if stored != dtypes.stored_form(own.dtype, own.shape):
        raise ValueError(f"{stored[0]}{shown(stored[1])} is no tile of {shown(str(spec))}")
    if file.header_bytes + first != expected or last - first != own.nbytes:
        raise ValueError(f"bytes {first} to {last} leave a gap, overlap or are too many")
    return own, Extent(file.name, expected, own.nbytes)
