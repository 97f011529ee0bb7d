# SPDX-License-Identifier: Apache-2.0
"""Lets one process be each rank of a device mesh in turn, on torch's fake process group."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import debug
from torch.testing._internal.distributed.fake_pg import FakeStore

from mpi_ckpt.states.buffers.array_bytes import array_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpi_ckpt.leaves.leaf import Leaf
    from mpi_ckpt.state import Arrival, Capture


@contextmanager
def being_rank(rank: int, size: int) -> Iterator[None]:
    """Be a rank of a process group whose collectives do nothing."""
    # torch keeps what it has found for equal meshes, with the coordinate of another rank.
    for name in dir(debug):
        if name.startswith("_clear"):
            getattr(debug, name)()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def each_rank(*shape: int, names: Sequence[str] = ("dp", "tp")) -> Iterator[tuple]:
    """Be each rank of a mesh in turn; yield the rank and the mesh."""
    size = int(np.prod(shape))
    for rank in range(size):
        with being_rank(rank, size):
            yield rank, init_device_mesh("cpu", shape, mesh_dim_names=tuple(names))


def slices(box) -> tuple:
    return (*(slice(o, e) for o, e in zip(box.offset, box.end, strict=True)), ...)


def tile_values(leaf: Leaf) -> list[tuple]:
    """Return box and elements of each tile of a leaf; a whole leaf is one tile."""
    dtype = array_dtype(leaf.spec.dtype)
    if leaf.tiles is None:
        values = np.frombuffer(leaf.buffer.read(), dtype).reshape(leaf.spec.shape)
        return [(..., values)]
    return [
        (tile.box, np.frombuffer(tile.buffer.read(), dtype).reshape(tile.box.shape))
        for tile in leaf.tiles
    ]


def join(captures: Sequence[Capture]) -> dict[str, np.ndarray]:
    """Return the whole leaves from what all ranks have captured; each element is there."""
    wholes: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for captured in captures:
        for leaf in captured.leaves:
            name, shape = leaf.spec.name, leaf.spec.shape
            whole = wholes.setdefault(name, np.zeros(shape, array_dtype(leaf.spec.dtype)))
            count = counts.setdefault(name, np.zeros(shape, int))
            for box, values in tile_values(leaf):
                where = box if box is ... else slices(box)
                whole[where] = values
                count[where] += 1
    assert all((count > 0).all() for count in counts.values())
    return wholes


def fill(arrival: Arrival, names: Sequence[str], wholes: dict[str, np.ndarray]) -> None:
    """Write the saved bytes into the places of a restore, and let the state adopt them."""
    for name, leaf in zip(names, arrival.leaves, strict=True):
        if leaf is None:
            continue
        parts = [(..., leaf.buffer)]
        if leaf.tiles is not None:
            parts = [(slices(tile.box), tile.buffer) for tile in leaf.tiles]
        for where, buffer in parts:
            data = np.ascontiguousarray(wholes[name][where]).tobytes()
            view = buffer.view()
            if view is None:
                buffer.write(memoryview(data))
            else:
                view[:] = data
    arrival.adopt()


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(np.prod(shape))).reshape(shape)
