# SPDX-License-Identifier: Apache-2.0
"""Encodes and decodes a manifest: pure, and without trust in any byte it reads.

The last member of the JSON object is the digest of all bytes before it, so any change is
detected without a rule for canonical JSON (docs/format.md). That tail, ``format`` and
``version`` are fixed for all future versions.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import UnsupportedFormatError
from mpi_ckpt.leaves.digest import ALGORITHM, DIGEST_BYTES, digest_bytes
from mpi_ckpt.storage.format.layout import (
    check_file_name,
    check_names_differ,
    check_state_name,
)
from mpi_ckpt.storage.format.leaf_list import (
    check_overlaps,
    decode_leaves,
    decode_place,
    encode_leaves,
    encode_stream,
    lift_leaves,
)
from mpi_ckpt.storage.format.manifest import (
    CutLeaf,
    LocalSet,
    Manifest,
    StoredFile,
    StoredState,
)
from mpi_ckpt.storage.format.strict_json import (
    SIZE_MAX,
    as_hash,
    as_integer,
    as_list,
    as_real,
    as_spec,
    as_text,
    read_json,
    shown,
)
from mpi_ckpt.storage.format.tensorfile import HEADER_BYTES_MAX

if TYPE_CHECKING:
    from mpi_ckpt.storage.format.leaf_list import LeafRows


FORMAT = "mpi_ckpt"
VERSIONS = (1, 2, 3)
"""Version 3 lies on several hosts (`LocalSet`); else 2 has leaves cut over the ranks."""

MANIFEST_BYTES_MAX = 64 << 20
"""Names some 300,000 leaves; reading it takes memory by its size (docs/security.md)."""

_TAIL_START = b',"digest":"'
_TAIL_END = b'"}\n'
_TAIL_BYTES = len(_TAIL_START) + 2 * DIGEST_BYTES + len(_TAIL_END)
_BLOCK_BYTES_RANGE = range(1, (64 << 20) + 1)
_NUMBER_MAX = (1 << 63) - 1
_RANK_MAX = (1 << 31) - 1
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
    is_local = manifest.local is not None
    document = {
        "format": FORMAT,
        "version": 3 if is_local else 1 + any(state.cut for state in manifest.states),
        "digest_algorithm": ALGORITHM,
        "block_bytes": manifest.block_bytes,
        "generation": manifest.generation,
        "step": as_integer(manifest.step, _NUMBER_MAX, -_NUMBER_MAX),
        "time": manifest.time,
        "job": manifest.job,
        "size": manifest.size,
        "metrics": {as_text(k): _encode_metric(v) for k, v in manifest.metrics.items()},
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
    if manifest.local is not None:
        document["local"] = manifest.local.to_json()
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
        return f'{{"name":{name},"stream":{{{encode_stream(state.leaves[0])}}}}}'
    leaves = encode_leaves(state.leaves)
    cut = _encode_cut(state) if state.cut else ""
    structure = _json(state.structure)
    return f'{{"name":{name},"structure":{structure},"leaves":[{leaves}]{cut}}}'


def _encode_cut(state: StoredState) -> str:
    cut = [
        {
            "name": as_text(leaf.spec.name),
            "dtype": leaf.spec.dtype,
            "shape": leaf.spec.shape,
            "tiles": leaf.tiles,
        }
        for leaf in state.cut
    ]
    return f',"cut":{_json(cut)},"tile_files":{_json(state.files)}'


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
    text, lists = lift_leaves(data)
    if lists:
        # What is wrong is told by the plain way, which reads leaf by leaf.
        with suppress(ValueError):
            return _decode_text(text, lists)
    return _decode_text(data, {})


def _decode_text(text: bytes | bytearray, lists: dict[str, LeafRows]) -> Manifest:
    try:
        document = read_json(text)
        _expect(isinstance(document, dict), "the manifest is not a JSON object")
        _refuse_other_formats(document)
        return _decode_manifest(document, lists)
    except KeyError as error:
        raise ValueError(f"the manifest lacks {shown(error.args[0])}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the manifest has a value of the wrong kind: {error}") from error


def _refuse_other_formats(document: dict[str, Any]) -> None:
    version = document.get("version")
    is_ours = document.get("format") == FORMAT and type(version) is int
    if not is_ours or version not in VERSIONS:
        raise UnsupportedFormatError(
            f"the manifest is of format {shown(document.get('format'))} version "
            f"{shown(version)}; this library reads {FORMAT!r} versions 1 to 3"
        )


def _decode_manifest(document: dict[str, Any], lists: dict[str, LeafRows]) -> Manifest:
    _expect(document["digest_algorithm"] == ALGORITHM, "unknown digest algorithm")
    block_bytes = as_integer(document["block_bytes"], _BLOCK_BYTES_RANGE.stop - 1, 1)
    files = tuple(_decode_file(entry) for entry in as_list(document["files"]))
    sizes = {file.name: file for file in files}
    _expect(len(sizes) == len(files), "a file is listed twice")
    states = tuple(
        _decode_state(entry, lists, sizes, block_bytes)
        for entry in as_list(document["states"])
    )
    _expect(not lists, "a list of leaves is outside of the states")
    if document["version"] > 1:
        entries = zip(states, document["states"], strict=True)
        states = tuple(_with_cut(state, entry, sizes) for state, entry in entries)
    check_names_differ(state.name for state in states)
    _check_extents(states, sizes)
    return Manifest(
        generation=as_integer(document["generation"], _NUMBER_MAX),
        step=as_integer(document["step"], _NUMBER_MAX, -_NUMBER_MAX),
        time=as_real(document["time"]),
        job=as_text(document["job"]),
        size=as_integer(document["size"], _RANK_MAX, 1),
        metrics={k: _decode_metric(v) for k, v in document["metrics"].items()},
        block_bytes=block_bytes,
        files=files,
        states=states,
        local=None
        if document["version"] != 3
        else LocalSet.from_json(document["local"], len(files)),
    )


def _decode_file(entry: dict[str, Any]) -> StoredFile:
    file = StoredFile(
        name=check_file_name(entry["name"]),
        nbytes=as_integer(entry["bytes"], SIZE_MAX),
        header_bytes=as_integer(entry["header_bytes"], HEADER_BYTES_MAX),
        header_digest=as_hash(entry["header_digest"]),
        generation=as_integer(entry["generation"], _NUMBER_MAX),
    )
    _expect(file.header_bytes <= file.nbytes, f"{file.name}: header beyond its end")
    return file


def _decode_state(
    entry: dict[str, Any],
    lists: dict[str, LeafRows],
    files: dict[str, StoredFile],
    block_bytes: int,
) -> StoredState:
    name = entry["name"]
    check_state_name(name)
    if "stream" in entry:
        return StoredState.of_stream(
            name, *decode_place(entry["stream"], files, block_bytes)
        )
    leaves = decode_leaves(as_list(entry["leaves"]), lists, files, block_bytes)
    names = set(leaves.form.names)
    _expect(len(names) == len(leaves), f"state {name!r} lists a leaf twice")
    return StoredState(name, entry["structure"], leaves)


def _with_cut(
    state: StoredState, entry: dict[str, Any], files: dict[str, StoredFile]
) -> StoredState:
    """Return a state with its cut leaves, which version 1 does not have."""
    if state.is_stream or "cut" not in entry:
        return state
    cut = tuple([_decode_cut_leaf(one) for one in as_list(entry["cut"])])
    names = [*state.leaves.form.names, *(leaf.spec.name for leaf in cut)]
    _expect(len(set(names)) == len(names), f"state {state.name!r} lists a leaf twice")
    tile_files = tuple([files[as_text(name)].name for name in as_list(entry["tile_files"])])
    _expect(
        len(set(tile_files)) == len(tile_files),
        f"state {state.name!r} lists a file of tiles twice",
    )
    _expect(
        bool(tile_files) == any(leaf.tiles for leaf in cut),
        f"state {state.name!r} has tiles without files, or files without tiles",
    )
    return replace(state, cut=cut, files=tile_files)


def _decode_cut_leaf(entry: dict[str, Any]) -> CutLeaf:
    spec = as_spec(entry["name"], entry["dtype"], entry["shape"])
    leaf = CutLeaf(spec, as_integer(entry["tiles"], SIZE_MAX))
    if (leaf.tiles == 0) != (0 in spec.shape):
        raise ValueError(f"leaf {shown(str(spec))} has {leaf.tiles} tiles")
    return leaf


def _check_extents(states: tuple[StoredState, ...], files: dict[str, StoredFile]) -> None:
    used = {name for state in states for name in state.leaves.files}
    for name in {name for state in states for name in state.files}:
        _expect(name not in used, f"{name}: has leaves and tiles")
    check_overlaps(files, [state.leaves for state in states])


def _decode_metric(value: object) -> float:
    return float(value) if value in _NOT_FINITE else as_real(value)


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
