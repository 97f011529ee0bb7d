# SPDX-License-Identifier: Apache-2.0
"""Writes generations whose arrays are cut over ranks, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.digest import BLOCK_BYTES
from mpi_ckpt.leaf import LeafSpec
from mpi_ckpt.states.array_dtypes import array_dtype_name
from mpi_ckpt.storage.format.layout import tile_file_name
from mpi_ckpt.storage.format.manifest import CutLeaf, Manifest, StoredState
from mpi_ckpt.storage.format.manifest_codec import encode
from mpi_ckpt.storage.format.tile_table import TileEntry, plan_tile_file
from mpi_ckpt.storage.writing.partial import Partial
from mpi_ckpt.storage.writing.tile_file import write_tile_file

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
    beside: tuple[StoredState, ...] = (),
) -> Path:
    """Publish a generation of cut leaves, with a file for each rank that has tiles."""
    root.mkdir(exist_ok=True)
    partial = Partial(root, generation, "9f3c2a61b07e", mode=mode)
    specs = {name: spec_of(name, one.array) for name, one in arrays.items()}
    files = []
    for rank in range(max(len(one.boxes) for one in arrays.values())):
        owned = [(n, box) for n, one in arrays.items() for box in one.boxes[rank]]
        if not owned:
            continue
        entries = [TileEntry(state, specs[name], box) for name, box in owned]
        plan = plan_tile_file(entries, block_bytes)
        tiles = (bytes_of(arrays[owned[at][0]].array, owned[at][1]) for at in plan.order)
        files.append(write_tile_file(partial, tile_file_name(rank), plan, tiles))
    counts = {name: sum(map(len, one.boxes)) for name, one in arrays.items()}
    cut = tuple(CutLeaf(spec, counts[name]) for name, spec in specs.items())
    names = tuple(file.name for file in files)
    manifest = Manifest(
        generation=generation,
        step=10 * generation,
        time=1.5e9,
        job="9f3c2a61b07e",
        size=max(len(one.boxes) for one in arrays.values()),
        block_bytes=block_bytes,
        files=tuple(files),
        states=(StoredState(state, None, cut=cut, files=names), *beside),
    )
    return partial.publish(encode(manifest))


def spec_of(name: str, array: np.ndarray) -> LeafSpec:
    """Return the spec of a leaf of an array."""
    return LeafSpec(name, array_dtype_name(array.dtype), array.shape)


def bytes_of(array: np.ndarray, box: Box) -> memoryview:
    """Return the bytes of a box, in its C order."""
    inside = tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))
    flat = np.ascontiguousarray(array[inside]).reshape(-1)
    return memoryview(flat.view(np.uint8))
