# SPDX-License-Identifier: Apache-2.0
"""Encodes and decodes a manifest: pure, and without trust in any byte it reads.

The last member of the JSON object is the digest of all bytes before it, so any change is
detected without a rule for canonical JSON (docs/format.md). That tail, ``format`` and
``version`` are fixed for all future versions.
"""

from __future__ import annotations

import json
import math
from json.encoder import encode_basestring
from typing import Any

from mpi_ckpt import dtypes
from mpi_ckpt.digest import ALGORITHM, DIGEST_BYTES, Digest, digest_bytes
from mpi_ckpt.errors import UnsupportedFormatError
from mpi_ckpt.leaf import LeafSpec
from mpi_ckpt.storage.format.layout import (
    check_file_name,
    check_names_differ,
    check_state_name,
)
from mpi_ckpt.storage.format.manifest import (
    Extent,
    Manifest,
    StoredFile,
    StoredLeaf,
    StoredState,
)
from mpi_ckpt.storage.format.strict_json import read_json, shown
from mpi_ckpt.storage.format.tensorfile import HEADER_BYTES_MAX

FORMAT = "mpi_ckpt"
VERSION = 1
MANIFEST_BYTES_MAX = 64 << 20
"""Names some 300,000 leaves; reading it takes memory by its size (docs/security.md)."""

_TAIL_START = b',"digest":"'
_TAIL_END = b'"}\n'
_TAIL_BYTES = len(_TAIL_START) + 2 * DIGEST_BYTES + len(_TAIL_END)
_BLOCK_BYTES_RANGE = range(1, (64 << 20) + 1)
_NUMBER_MAX = (1 << 63) - 1
_RANK_MAX = (1 << 31) - 1
_SIZE_MAX = 1 << 60
_NOT_FINITE = frozenset({"nan", "inf", "-inf"})


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of ``manifest.json``.

    Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, for values from the user that `decode` would
            refuse: a step that is not an integer, a structure that is not JSON, names that
            collide with those of carried states.
    """
    check_names_differ(state.name for state in manifest.states)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "digest_algorithm": ALGORITHM,
        "block_bytes": manifest.block_bytes,
        "generation": manifest.generation,
        "step": _integer(manifest.step, _NUMBER_MAX, -_NUMBER_MAX),
        "time": manifest.time,
        "job": manifest.job,
        "size": manifest.size,
        "metrics": {_text(k): _encode_metric(v) for k, v in manifest.metrics.items()},
        "files": [
            {
                "name": file.name,
                "bytes": file.nbytes,
                "header_bytes": file.header_bytes,
                "header_digest": file.header_digest.hex(),
                "generation": file.generation,
            }
            for file in manifest.files
        ],
    }
    states = ",".join([_encode_state(state) for state in manifest.states])
    head = f'{_json(document)[:-1]},"states":[{states}]'.encode()
    return head + _TAIL_START + digest_bytes(head).hex().encode() + _TAIL_END


def _encode_metric(value: float) -> float | str:
    # JSON has no NaN and no infinity.
    return value if math.isfinite(value) else str(value)


def _json(value: object) -> str:
    # Without allow_nan=False this writes a NaN, which JSON readers refuse.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _encode_state(state: StoredState) -> str:
    name = _json(state.name)
    if state.is_stream:
        return f'{{"name":{name},"stream":{{{_encode_place(state.leaves[0])}}}}}'
    leaves = ",".join([_encode_leaf(leaf) for leaf in state.leaves])
    return f'{{"name":{name},"structure":{_json(state.structure)},"leaves":[{leaves}]}}'


# Built as text: a dict for each of thousands of leaves takes three times as long.
def _encode_leaf(leaf: StoredLeaf) -> str:
    spec = leaf.spec
    name, dtype = encode_basestring(_text(spec.name)), encode_basestring(spec.dtype)
    shape = ",".join(map(str, spec.shape))
    return f'{{"name":{name},"dtype":{dtype},"shape":[{shape}],{_encode_place(leaf)}}}'


def _encode_place(leaf: StoredLeaf) -> str:
    extent, digest = leaf.extent, leaf.digest
    text = (
        f'"file":"{extent.file}","offset":{extent.offset},"bytes":{extent.nbytes},'
        f'"digest":"{digest.whole.hex()}"'
    )
    if len(digest.blocks) == 1:
        return text
    return f'{text},"blocks":"{b"".join(digest.blocks).hex()}"'


def largest_state(manifest: Manifest) -> tuple[str, int]:
    """Return the state that takes most bytes of a manifest, and that number.

    Not collective. Thread-safe. It encodes all states, so it is called only if a manifest
    has grown large.
    """
    sizes = {state.name: len(_encode_state(state).encode()) for state in manifest.states}
    return max(sizes.items(), key=lambda item: item[1], default=("", 0))


def decode(data: bytes | bytearray) -> Manifest:
    """Read the bytes of ``manifest.json``.

    Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if a byte was changed or a rule is broken.
        UnsupportedFormatError: On the calling rank, if the manifest is intact but has
            another format or version.
    """
    head = memoryview(data)[:-_TAIL_BYTES]
    expected = _TAIL_START + digest_bytes(head).hex().encode() + _TAIL_END
    if data[-_TAIL_BYTES:] != expected:
        raise ValueError("the manifest does not match its own digest")
    try:
        document = read_json(data)
        _expect(isinstance(document, dict), "the manifest is not a JSON object")
        _refuse_other_formats(document)
        return _decode_manifest(document)
    except KeyError as error:
        raise ValueError(f"the manifest lacks {shown(error.args[0])}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the manifest has a value of the wrong kind: {error}") from error


def _refuse_other_formats(document: dict[str, Any]) -> None:
    version = document.get("version")
    if document.get("format") != FORMAT or type(version) is not int or version != VERSION:
        raise UnsupportedFormatError(
            f"the manifest is of format {shown(document.get('format'))} version "
            f"{shown(version)}; this library reads {FORMAT!r} version {VERSION}"
        )


def _decode_manifest(document: dict[str, Any]) -> Manifest:
    _expect(document["digest_algorithm"] == ALGORITHM, "unknown digest algorithm")
    block_bytes = _integer(document["block_bytes"], _BLOCK_BYTES_RANGE.stop - 1, 1)
    files = tuple(_decode_file(entry) for entry in _list(document["files"]))
    sizes = {file.name: file for file in files}
    _expect(len(sizes) == len(files), "a file is listed twice")
    states = tuple(
        _decode_state(entry, sizes, block_bytes) for entry in _list(document["states"])
    )
    check_names_differ(state.name for state in states)
    _check_extents(states, sizes)
    return Manifest(
        generation=_integer(document["generation"], _NUMBER_MAX),
        step=_integer(document["step"], _NUMBER_MAX, -_NUMBER_MAX),
        time=_real(document["time"]),
        job=_text(document["job"]),
        size=_integer(document["size"], _RANK_MAX, 1),
        metrics={k: _decode_metric(v) for k, v in document["metrics"].items()},
        block_bytes=block_bytes,
        files=files,
        states=states,
    )


def _decode_file(entry: dict[str, Any]) -> StoredFile:
    file = StoredFile(
        name=check_file_name(entry["name"]),
        nbytes=_integer(entry["bytes"], _SIZE_MAX),
        header_bytes=_integer(entry["header_bytes"], HEADER_BYTES_MAX),
        header_digest=_digest(entry["header_digest"]),
        generation=_integer(entry["generation"], _NUMBER_MAX),
    )
    _expect(file.header_bytes <= file.nbytes, f"{file.name}: header beyond its end")
    return file


def _decode_state(
    entry: dict[str, Any], files: dict[str, StoredFile], block_bytes: int
) -> StoredState:
    name = entry["name"]
    check_state_name(name)
    if "stream" in entry:
        return StoredState.of_stream(
            name, *_decode_place(entry["stream"], files, block_bytes)
        )
    leaves = tuple(_decode_leaf(e, files, block_bytes) for e in _list(entry["leaves"]))
    names = {leaf.spec.name for leaf in leaves}
    _expect(len(names) == len(leaves), f"state {name!r} lists a leaf twice")
    return StoredState(name, entry["structure"], leaves)


def _decode_leaf(
    entry: dict[str, Any], files: dict[str, StoredFile], block_bytes: int
) -> StoredLeaf:
    name, dtype = _text(entry["name"]), _text(entry["dtype"])
    # Here and below, messages are made only when needed: there may be many leaves.
    if not dtypes.is_known(dtype):
        raise ValueError(f"leaf {shown(name)} has the unknown dtype {shown(dtype)}")
    shape = tuple([_integer(length, _SIZE_MAX) for length in _list(entry["shape"])])
    if len(shape) > 64:
        raise ValueError(f"leaf {shown(name)} has {len(shape)} dimensions")
    spec = LeafSpec(name, dtype, shape)
    extent, digest = _decode_place(entry, files, block_bytes)
    if spec.nbytes != extent.nbytes:
        raise ValueError(
            f"leaf {shown(name)} {dtype}{shown(shape)} takes {shown(spec.nbytes)} bytes, "
            f"{extent.nbytes} listed"
        )
    return StoredLeaf(spec, extent, digest)


def _decode_place(
    entry: dict[str, Any], files: dict[str, StoredFile], block_bytes: int
) -> tuple[Extent, Digest]:
    file = files[entry["file"]]
    offset = _integer(entry["offset"], _SIZE_MAX)
    nbytes = _integer(entry["bytes"], _SIZE_MAX)
    if offset < file.header_bytes or offset + nbytes > file.nbytes:
        end = offset + nbytes
        raise ValueError(f"{file.name}: bytes {offset} to {end} lie outside its data")
    whole = _digest(entry["digest"])
    blocks = bytes.fromhex(_text(entry["blocks"])) if "blocks" in entry else whole
    if len(blocks) != max(1, -(-nbytes // block_bytes)) * DIGEST_BYTES:
        raise ValueError(f"{file.name}: wrong number of blocks")
    cuts = range(0, len(blocks), DIGEST_BYTES)
    digest = Digest(tuple([blocks[cut : cut + DIGEST_BYTES] for cut in cuts]))
    if digest.whole != whole:
        raise ValueError(f"{file.name}: block digests do not match")
    return Extent(file.name, offset, nbytes), digest


def _check_extents(states: tuple[StoredState, ...], files: dict[str, StoredFile]) -> None:
    by_file: dict[str, list[Extent]] = {name: [] for name in files}
    for state in states:
        for leaf in state.leaves:
            by_file[leaf.extent.file].append(leaf.extent)
    for name, extents in by_file.items():
        end = 0
        for extent in sorted(extents, key=lambda extent: (extent.offset, extent.nbytes)):
            if extent.offset < end:
                raise ValueError(f"{name}: leaves overlap at {extent.offset}")
            end = extent.offset + extent.nbytes


def _integer(value: object, most: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"the manifest has {shown(value)} where an integer belongs")  # noqa: TRY004 (bad bytes)
    if not least <= value <= most:
        raise ValueError(f"the manifest has {shown(value)}, out of range")
    return value


def _real(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"the manifest has {shown(value)} where a number belongs")  # noqa: TRY004 (bad bytes)
    try:
        real = float(value)
    except OverflowError:  # an integer too large for a float
        real = math.inf
    _expect(math.isfinite(real), "the manifest has a number out of range")
    return real


def _decode_metric(value: object) -> float:
    return float(value) if value in _NOT_FINITE else _real(value)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"the manifest has {shown(value)} where a list belongs")  # noqa: TRY004 (bad bytes)
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the manifest has {shown(value)} where text belongs")  # noqa: TRY004 (bad bytes)
    return value


def _digest(value: object) -> bytes:
    digest = bytes.fromhex(_text(value))
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"{shown(value)} is no digest")
    return digest


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
