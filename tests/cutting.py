# SPDX-License-Identifier: Apache-2.0
"""Writes generations whose arrays are cut over ranks, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.leaves.digest import BLOCK_BYTES, Digest, digest_bytes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.states.buffers.array_bytes import array_dtype_name
from mpi_ckpt.storage.format.layout import shard_file_name, tile_file_name
from mpi_ckpt.storage.format.manifest import (
    CutLeaf,
    Extent,
    Manifest,
    StoredFile,
    StoredLeaf,
    StoredLeaves,
    StoredState,
)
from mpi_ckpt.storage.format.manifest_codec import encode
from mpi_ckpt.storage.format.tensorfile import encode_header
from mpi_ckpt.storage.format.tile_table import TileEntry, plan_tile_file
from mpi_ckpt.storage.writing.outfile import write_tile_file
from mpi_ckpt.storage.writing.partial import Partial

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.storage.writing.outfile import IOMode


@dataclass
class CutArray:
    """An array and its tiles on each rank, as a job that cuts it over its ranks has it.

    Attributes:
        array: The whole array.
        boxes: For each rank the boxes of its tiles.
    """

    array: np.ndarray
    boxes: list[list[Box]]

    @classmethod
    def by_rows(cls, array: np.ndarray, rows: list[int]) -> CutArray:
        """Cut an array along its first dimension, so many rows for each rank."""
        starts = np.cumsum([0, *rows]).tolist()
        boxes = [
            [Box((start, *(0,) * (array.ndim - 1)), (n, *array.shape[1:]))] if n else []
            for start, n in zip(starts, rows, strict=False)
        ]
        return cls(array, boxes)


def write_cut(
    root: Path,
    arrays: dict[str, CutArray],
    *,
    state: str = "fields",
    generation: int = 1,
    block_bytes: int = BLOCK_BYTES,
    mode: IOMode = "auto",
    whole: dict[str, np.ndarray] | None = None,
) -> Path:
    """Publish a generation of cut leaves, with a file for each rank that has tiles.

    Args:
        root: The checkpoint directory.
        arrays: The cut arrays; all have as many ranks.
        state: Name of their state.
        generation: Its number.
        block_bytes: Block length of the digests.
        mode: How files are written.
        whole: Leaves of the same state that every rank has whole.
    """
    root.mkdir(exist_ok=True)
    partial = Partial(root, generation, "9f3c2a61b07e", mode=mode)
    specs = {name: spec_of(name, one.array) for name, one in arrays.items()}
    files, leaves = [], StoredLeaves.of(())
    if whole:
        file, leaves = write_whole(partial, state, whole, block_bytes)
        files.append(file)
    for rank in range(max(len(one.boxes) for one in arrays.values())):
        owned = [(n, box) for n, one in arrays.items() for box in one.boxes[rank]]
        if not owned:
            continue
        entries = [TileEntry(state, specs[name], box) for name, box in owned]
        plan = plan_tile_file(entries, block_bytes)
        tiles = ([bytes_of(arrays[owned[at][0]].array, owned[at][1])] for at in plan.order)
        file, _ = write_tile_file(partial, tile_file_name(rank), plan, tiles)
        files.append(file)
    counts = {name: sum(map(len, one.boxes)) for name, one in arrays.items()}
    cut = tuple(CutLeaf(spec, counts[name]) for name, spec in specs.items())
    names = tuple(file.name for file in files if file.name.startswith("tiles-"))
    manifest = Manifest(
        generation=generation,
        step=10 * generation,
        time=1.5e9,
        job="9f3c2a61b07e",
        size=max(len(one.boxes) for one in arrays.values()),
        block_bytes=block_bytes,
        files=tuple(files),
        states=(StoredState(state, None, leaves, cut=cut, files=names),),
    )
    return partial.publish(encode(manifest))


def write_whole(
    partial: Partial, state: str, arrays: dict[str, np.ndarray], block_bytes: int
) -> tuple[StoredFile, StoredLeaves]:
    """Write leaves that are not cut, as root does."""
    name, specs = shard_file_name(0), [spec_of(n, a) for n, a in arrays.items()]
    header = encode_header([(f"{state}/{one.name}", one) for one in specs], {})
    data = [bytes_of(array, Box.whole(array.shape)) for array in arrays.values()]
    *offsets, end = accumulate(map(len, data), initial=len(header))
    partial.write_shard(name, [memoryview(header), *data], end)
    leaves = StoredLeaves.of(
        StoredLeaf(spec, Extent(name, offset, len(one)), Digest.of(one, block_bytes))
        for spec, offset, one in zip(specs, offsets, data, strict=True)
    )
    file = StoredFile(name, end, len(header), digest_bytes(header), partial.generation)
    return file, leaves


def spec_of(name: str, array: np.ndarray) -> LeafSpec:
    """Return the spec of a leaf of an array."""
    return LeafSpec(name, array_dtype_name(array.dtype), array.shape)


def bytes_of(array: np.ndarray, box: Box) -> memoryview:
    """Return the bytes of a box, in its C order."""
    inside = tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))
    flat = np.ascontiguousarray(array[inside]).reshape(-1)
    return memoryview(flat.view(np.uint8))
