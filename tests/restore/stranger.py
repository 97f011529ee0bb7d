# SPDX-License-Identifier: Apache-2.0
"""A reader of generations written from docs/format.md alone, as a stranger would.

INVARIANT: nothing of the package is imported here. What cannot be told from the document is
missing from the document.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    data = (path / "manifest.json").read_bytes()
    head, tail = data[:-TAIL_BYTES], data[-TAIL_BYTES:]
    need(tail == f',"digest":"{digest(head)}"}}\n'.encode(), "the manifest's digest")
    manifest = json.loads(data)
    need(manifest["format"] == "mpi_ckpt" and manifest["version"] == 1, "the version")
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
    for shard in sorted(path.glob("rank-*.safetensors")):
        found.update(deserialize(shard.read_bytes()))
    return found
