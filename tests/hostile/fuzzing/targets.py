# SPDX-License-Identifier: Apache-2.0
"""The functions that take any bytes, and what must hold of each of them.

A target returns whether the bytes were good. It raises for a fault of the library: an error
from outside the family, a manifest that is not read as it would be written, bytes that are
handed out and are not those the manifest vouches for.

Manifests get a right digest first: a fuzzer would never find one, and whoever forges a
manifest can take it.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi_ckpt.cli.convert.foreign import open_safetensors
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import CheckpointError, UnsupportedFormatError
from mpi_ckpt.leaves.digest import Digest, digest_bytes
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, MemoryBuffer
from mpi_ckpt.storage.format.manifest import StoredFile
from mpi_ckpt.storage.format.manifest_codec import decode, encode
from mpi_ckpt.storage.format.tensorfile import fill_leaves, parse_header, read_form
from mpi_ckpt.storage.format.tile_table import (
    TileEntry,
    decode_tile_header,
    plan_tile_file,
)
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parents[2] / "restore" / "golden" / "v1" / "checkpoint-00000001"
_SMALL_BYTES = 1 << 20
_TAIL_BYTES = 46
_BLOCK = 16


def _head(manifest: bytes) -> bytes:
    return manifest[:-_TAIL_BYTES]


def _sealed(head: bytes) -> bytes:
    return head + b',"digest":"' + digest_bytes(head).hex().encode() + b'"}\n'


def manifest(data: bytes) -> bool:
    """Decode a manifest; what is taken must be written and read again as the same."""
    with suppress(ValueError, UnsupportedFormatError):
        decode(data)
    # With a space, which JSON allows, its leaves are read one by one and not in columns.
    spaced = data.replace(b',"leaves":[', b',"leaves": [')
    try:
        found = decode(_sealed(data))
    except (ValueError, UnsupportedFormatError):
        found = None
    try:
        one_by_one = decode(_sealed(spaced))
    except (ValueError, UnsupportedFormatError):
        one_by_one = None
    assert repr(one_by_one) == repr(found)
    if found is None:
        return False
    again = decode(encode(found))
    assert repr(again) == repr(found)
    return True


def header(data: bytes) -> bool:
    """Read a safetensors header: by itself, as a stream, and as a file of somebody's."""
    good = False
    with suppress(ValueError):
        good = isinstance(parse_header(data), dict)
    whole = len(data).to_bytes(8, "little") + data
    with suppress(CheckpointError):
        stream = io.BytesIO(whole + bytes(64))
        _, specs = read_form(stream)
        small = [spec for spec in specs if spec.nbytes <= _SMALL_BYTES]
        fill_leaves(
            stream, small, [Leaf(spec, MemoryBuffer.empty(spec.nbytes)) for spec in small]
        )
    place = _place() / "x.safetensors"
    place.write_bytes(whole + bytes(64))
    with suppress(CheckpointError), open_safetensors(place) as content:
        for leaf in content.leaves.values():
            assert len(leaf.buffer.read()) == leaf.spec.nbytes <= 64
    return good


def tiles(data: bytes) -> bool:
    """Decode the header of a file of tiles; what is taken must be planned as the same.

    The input is the header with the two tables as JSON, not as text in JSON, so that
    changes of JSON reach what is in them.
    """
    with suppress(ValueError):
        decode_tile_header(data, StoredFile("a", 1 << 20, len(data), b"", 1), _BLOCK)
    header, file = _with_tables(data)
    try:
        found = decode_tile_header(header, file, _BLOCK)
    except ValueError as error:
        return _is_short(str(error))
    entries = [TileEntry(state, spec, tile.box) for state, spec, tile in found]
    digests = [tile.leaf.digest for _, _, tile in found]
    plan = plan_tile_file(entries, _BLOCK)
    planned = plan.encode([digests[at] for at in plan.order])
    again = StoredFile(file.name, plan.nbytes, plan.header_bytes, b"", 1)
    boxes = [(state, spec, tile.box) for state, spec, tile in found]
    assert [
        (state, spec, tile.box)
        for state, spec, tile in decode_tile_header(planned, again, _BLOCK)
    ] == [boxes[at] for at in plan.order]
    return True


def _with_tables(data: bytes) -> tuple[bytes, StoredFile]:
    """Return a header whose tables are text, and a file that is as long as it says."""
    end = 0
    with suppress(ValueError, RecursionError, TypeError, LookupError, AttributeError):
        document = json.loads(data)
        ends = [one["data_offsets"][1] for key, one in document.items() if key[:1] != "_"]
        end = max([n for n in ends if type(n) is int and 0 <= n < 1 << 60], default=0)
        tables = document["__metadata__"]
        for key in ("mpi_ckpt.leaves", "mpi_ckpt.tiles"):
            tables[key] = json.dumps(tables[key])
        data = json.dumps(document).encode()
    header = len(data).to_bytes(8, "little") + data
    return header, StoredFile("a", len(header) + end, len(header), b"", 1)


def directory(data: bytes) -> bool:
    """Open and prove a generation.

    The bytes are those of the manifest, the shard and the stream, with the lengths of the
    last two in front. An odd number of bytes asks for right digests of what is there, so
    that what lies behind them is reached.
    """
    generation = _place() / "checkpoint-00000001"
    generation.mkdir(exist_ok=True)
    head, shard, stream = split(data)
    files = {"rank-00000.safetensors": shard, "a.bin": stream}
    if len(data) % 2:
        with suppress(ValueError, RecursionError):
            head = _head_of(_vouched(json.loads(head + b"}"), files))
    for name, content in files.items():
        (generation / name).write_bytes(content)
    (generation / "manifest.json").write_bytes(_sealed(head))
    try:
        with GenerationReader(generation) as reader:
            verify(reader)
            _check(reader, files)
    except CheckpointError as error:
        return _is_short(str(error))
    return True


def split(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Cut an input into the start of a manifest, a shard and a stream."""
    shard = int.from_bytes(data[:2], "little")
    stream = int.from_bytes(data[2:4], "little")
    rest = data[4:]
    return rest[shard + stream :], rest[:shard], rest[shard : shard + stream]


def join(head: bytes, shard: bytes, stream: bytes) -> bytes:
    """Make an input that `split` cuts so."""
    lengths = len(shard).to_bytes(2, "little") + len(stream).to_bytes(2, "little")
    return lengths + shard + stream + head


def _head_of(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()[:-1]


def _vouched(document: Any, files: dict[str, bytes]) -> Any:
    """Give every file and extent of a manifest the digest of the bytes that are there."""
    block = document.get("block_bytes") if isinstance(document, dict) else None
    block = block if type(block) is int and 0 < block <= 1 << 26 else 1 << 24
    stack: list[Any] = [document]
    while stack:
        node = stack.pop()
        stack.extend(node.values() if isinstance(node, dict) else ())
        stack.extend(node if isinstance(node, list) else ())
        if not isinstance(node, dict):
            continue
        name = node.get("file", node.get("name"))
        content = files.get(name) if isinstance(name, str) else None
        start, count = node.get("offset"), node.get("bytes")
        if content is None or type(count) is not int:
            continue
        if "header_digest" in node and type(node.get("header_bytes")) is int:
            digest = digest_bytes(content[: max(0, node["header_bytes"])])
            node["header_digest"] = digest.hex()
        if "digest" in node and type(start) is int and start >= 0 and 0 <= count < 1 << 16:
            node.update(_digests(content[start : start + count], block))
    return document


def _digests(data: bytes, block: int) -> dict[str, str]:
    digest = Digest.of(data, max(block, len(data) // 100, 1))
    members = {"digest": digest.whole.hex()}
    if len(digest.blocks) > 1:
        members["blocks"] = b"".join(digest.blocks).hex()
    return members


def _is_short(message: str) -> bool:
    assert len(message) < 10_000
    return False


def _check(reader: GenerationReader, files: dict[str, bytes]) -> None:
    for state in reader.manifest.states:
        for leaf in state.leaves:
            read = [
                bytes(reader.read_block(leaf, block))
                for block in range(len(leaf.digest.blocks))
            ]
            file, offset, nbytes = leaf.extent
            expected = files[file][offset : offset + nbytes]
            assert b"".join(read) == expected


_made: list[Path] = []


def _place() -> Path:
    """Return a directory for the files of inputs, one for the process."""
    if not _made:
        _made.append(Path(tempfile.mkdtemp(prefix="mpi_ckpt-fuzz-")))
    return _made[0]


def clear() -> None:
    """Remove that directory."""
    while _made:
        shutil.rmtree(_made.pop())


def _small_manifest() -> bytes:
    shard, stream = _small_files()
    whole = {"file": "rank-00000.safetensors", "offset": 8, "bytes": 24}
    document = {
        "format": "mpi_ckpt",
        "version": 1,
        "digest_algorithm": "xxh3-128",
        "block_bytes": 16,
        "generation": 1,
        "step": 7,
        "time": 1.5,
        "job": "j",
        "size": 2,
        "metrics": {"loss": 0.5},
        "files": [
            {
                "name": "rank-00000.safetensors",
                "bytes": len(shard),
                "header_bytes": 8,
                "header_digest": "",
                "generation": 1,
            },
            {
                "name": "a.bin",
                "bytes": len(stream),
                "header_bytes": 0,
                "header_digest": digest_bytes(b"").hex(),
                "generation": 0,
            },
        ],
        "states": [
            {
                "name": "m",
                "structure": {"ties": {}},
                "leaves": [
                    {"name": "w", "dtype": "F32", "shape": [2, 3], "digest": "", **whole}
                ],
            },
            {
                "name": "a",
                "stream": {"file": "a.bin", "offset": 0, "bytes": 9, "digest": ""},
            },
        ],
    }
    files = {"rank-00000.safetensors": shard, "a.bin": stream}
    return _head_of(_vouched(document, files))


def _small_files() -> tuple[bytes, bytes]:
    return (0).to_bytes(8, "little") + bytes(range(24)), b"some text"


def _headers() -> list[bytes]:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    leaves = {"structure": None, "leaves": [["w", "F32", [2, 3]]]}
    state = {"name": "s", "structure": None, "leaves": [["w", "w", "F32", [2, 3]]]}
    whole = {"step": 1, "size": 1, "metrics": {}, "states": [state]}
    return [
        json.dumps({"__metadata__": {"mpi_ckpt": json.dumps(said)}, "w": entry}).encode()
        for said in (leaves, whole)
    ]


def _tile_headers() -> list[bytes]:
    """Return headers of files of tiles, with their tables as JSON."""
    rho, one = LeafSpec("rho", "F32", (4, 3)), LeafSpec("one", "C64", ())
    cuts = [
        [TileEntry("s", rho, Box((row, 0), (2, 3))) for row in (0, 2)],
        [TileEntry("s", rho, Box((0, 1), (4, 2))), TileEntry("a/b", one, Box((), ()))],
    ]
    headers = []
    for entries in cuts:
        plan = plan_tile_file(entries, _BLOCK)
        digests = [Digest.of(bytes(entries[at].nbytes), _BLOCK) for at in plan.order]
        document = json.loads(plan.encode(digests)[8:])
        tables = document["__metadata__"]
        for key in ("mpi_ckpt.leaves", "mpi_ckpt.tiles"):
            tables[key] = json.loads(tables[key])
        headers.append(json.dumps(document).encode())
    return headers


def seeds(target: str) -> list[bytes]:
    """Return good inputs of a target, the golden generation's among them."""
    golden = _head((GOLDEN / "manifest.json").read_bytes())
    shard = (GOLDEN / "rank-00000.safetensors").read_bytes()
    length = int.from_bytes(shard[:8], "little")
    small, files = _small_manifest(), _small_files()
    return {
        "manifest": [small, golden],
        "header": [*_headers(), shard[8 : 8 + length].rstrip()],
        "tiles": _tile_headers(),
        "directory": [
            join(small + b" " * odd, *files)
            for odd in range(2)
        ],
    }[target]  # fmt: skip


TARGETS: dict[str, Callable[[bytes], bool]] = {
    "manifest": manifest,
    "header": header,
    "tiles": tiles,
    "directory": directory,
}
