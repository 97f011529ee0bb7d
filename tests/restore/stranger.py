# SPDX-License-Identifier: Apache-2.0
"""A reader of generations written from docs/format.md alone, as a stranger would.

INVARIANT: nothing of the package is imported here. What cannot be told from the document is
missing from the document.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import xxhash
from safetensors import deserialize

if TYPE_CHECKING:
    from pathlib import Path

TAIL_BYTES = 46


@dataclass
class Leaf:
    """A leaf as the manifest tells it, and its bytes."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Generation:
    """Everything in a generation: leaves by state and name, streams and structures."""

    manifest: dict[str, Any]
    leaves: dict[str, dict[str, Leaf]] = field(default_factory=dict)
    structures: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, bytes] = field(default_factory=dict)


class Damaged(Exception):
    """A digest, a size or a rule does not hold."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise Damaged(what)


def digest(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def read(path: Path) -> Generation:
    """Read and prove a generation."""
    manifest = read_manifest(path)
    files = {file["name"]: read_file(path, file) for file in manifest["files"]}
    found = Generation(manifest)
    for state in manifest["states"]:
        name = state["name"]
        if "stream" in state:
            found.streams[name] = read_extent(state["stream"], files, manifest)
            continue
        found.structures[name] = state["structure"]
        found.leaves[name] = {
            leaf["name"]: Leaf(
                leaf["dtype"], leaf["shape"], read_extent(leaf, files, manifest)
            )
            for leaf in state["leaves"]
        }
        found.leaves[name] |= read_cut(state, files, manifest)
    return found


def read_cut(
    state: dict[str, Any], files: dict[str, bytes], manifest: dict[str, Any]
) -> dict[str, Leaf]:
    """Put the cut leaves of a state together from their tiles."""
    wholes = {
        leaf["name"]: np.zeros(leaf["shape"], f"V{width(leaf['dtype'])}")
        for leaf in state.get("cut", [])
    }
    filled = {name: np.zeros(whole.shape, int) for name, whole in wholes.items()}
    count = dict.fromkeys(wholes, 0)
    for file in state.get("tile_files", []):
        for (owner, *form), offset, data, shape in read_tiles(file, files, manifest):
            if owner != state["name"]:
                continue
            (leaf,) = (one for one in state["cut"] if one["name"] == form[0])
            need(form == [leaf["name"], leaf["dtype"], leaf["shape"]], "a tile's leaf")
            name = form[0]
            inside = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            whole = wholes[name]
            whole[inside] = np.frombuffer(data, whole.dtype).reshape(shape)
            filled[name][inside] += 1
            count[name] += 1
    for leaf in state.get("cut", []):
        need((filled[leaf["name"]] == 1).all(), "a leaf made up of its tiles")
        need(count[leaf["name"]] == leaf["tiles"], "the number of tiles")
    return {
        leaf["name"]: Leaf(leaf["dtype"], leaf["shape"], wholes[leaf["name"]].tobytes())
        for leaf in state.get("cut", [])
    }


def read_tiles(file: str, files: dict[str, bytes], manifest: dict[str, Any]):
    """Give whole leaf, offset, bytes and shape of each tile of a file."""
    content = files[file]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    leaves = json.loads(metadata["mpi_ckpt.leaves"])
    end = 8 + length
    for number, offset, digest_text, blocks in json.loads(metadata["mpi_ckpt.tiles"]):
        state, name, *_ = leaf = leaves[number]
        where = ",".join(map(str, offset))
        tensor = header.pop(f"{quote(state, safe='')}/{name}@{where}")
        start, stop = tensor["data_offsets"]
        need(8 + length + start == end, "tiles without gaps")
        end = 8 + length + stop
        extent = {"file": file, "offset": 8 + length + start, "bytes": stop - start}
        extent |= {"digest": digest_text} | ({"blocks": blocks} if blocks else {})
        shape = tensor["shape"][: len(offset)]
        yield leaf, offset, read_extent(extent, files, manifest), shape
    need(not header and end == len(content), "a table of all tensors")


def width(dtype: str) -> int:
    """Return the bytes of an element of the types that the golden generations have."""
    known = {"BOOL": 1, "C64": 8, "C128": 16, "BF16": 2}
    if dtype in known:
        return known[dtype]
    match = re.search(r"([A-Z])(\d+)", dtype)
    assert match is not None
    size = int(match[2])
    if not dtype.startswith("numpy:"):
        return size // 8
    return 4 * size if match[1] == "U" else size


def read_manifest(path: Path) -> dict[str, Any]:
    data = (path / "manifest.json").read_bytes()
    head, tail = data[:-TAIL_BYTES], data[-TAIL_BYTES:]
    need(tail == f',"digest":"{digest(head)}"}}\n'.encode(), "the manifest's digest")
    manifest = json.loads(data)
    need(
        manifest["format"] == "mpi_ckpt" and manifest["version"] in (1, 2, 3), "the version"
    )
    need(manifest["digest_algorithm"] == "xxh3-128", "the algorithm")
    return manifest


def read_file(path: Path, file: dict[str, Any]) -> bytes:
    data = (path / file["name"]).read_bytes()
    need(len(data) == file["bytes"], f"the size of {file['name']}")
    header = data[: file["header_bytes"]]
    need(digest(header) == file["header_digest"], f"the header of {file['name']}")
    return data


def read_extent(
    extent: dict[str, Any], files: dict[str, bytes], manifest: dict[str, Any]
) -> bytes:
    start, length = extent["offset"], extent["bytes"]
    data = files[extent["file"]][start : start + length]
    need(len(data) == length, "an extent's length")
    cut = manifest["block_bytes"]
    blocks = [digest(data[at : at + cut]) for at in range(0, max(length, 1), cut)]
    need("".join(blocks) == extent.get("blocks", extent["digest"]), "a block's digest")
    whole = blocks[0] if len(blocks) == 1 else digest(bytes.fromhex("".join(blocks)))
    need(whole == extent["digest"], "an extent's digest")
    return data


def tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Return what the safetensors package says of all shards, by name in the file."""
    found: dict[str, dict[str, Any]] = {}
    for shard in sorted(path.glob("*.safetensors")):
        found.update(deserialize(shard.read_bytes()))
    return found
