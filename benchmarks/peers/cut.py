# SPDX-License-Identifier: Apache-2.0
"""Other ways to save arrays that are cut over the ranks, each as its documents say."""

from __future__ import annotations

import logging
import shutil
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from benchmarks import ceilings, names
from benchmarks.peers.base import is_installed
from benchmarks.peers.process_group import join_group

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.cut import CutArrays
    from benchmarks.setting import Setting

__all__ = ["CutPeer", "available_cut"]


class CutPeer:
    """A way to save and restore cut arrays. Every method is called on all ranks.

    Args:
        setting: Ranks and directory.
        path: A directory of its own, not there yet.

    Attributes:
        name: For the table.
        package: What must be installed.
        can_load: Whether it restores as well.
        is_durable: Whether a save is durable when it returns; else its files are fsynced.
    """

    name: ClassVar[str]
    package: ClassVar[str] = "mpi4py"
    can_load: ClassVar[bool] = False
    is_durable: ClassVar[bool] = False

    def __init__(self, setting: Setting, path: Path) -> None:
        self.setting = setting
        self.path = path

    @property
    def save_name(self) -> str:
        """Name of its durable save."""
        return self.name if self.is_durable else names.durable(self.name)

    def clear(self) -> None:
        """Remove what it has written, and make its empty directory."""

        def remove() -> None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir()

        self.setting.on_root(remove)()

    def save(self, cut: CutArrays) -> None:
        """Save the boxes of all ranks."""
        raise NotImplementedError

    def save_durably(self, cut: CutArrays) -> None:
        """Save the boxes of all ranks, and make what was written durable."""
        self.save(cut)
        if not self.is_durable:
            ceilings.fsync_shared(self.setting.comm, self.path)

    def load(self, cut: CutArrays) -> None:
        """Bring the saved elements into the live boxes."""
        raise NotImplementedError


class GatherToRoot(CutPeer):
    """Root gathers one whole array after the other and writes all of them to one file."""

    name = names.GATHER
    is_durable = True

    def save(self, cut: CutArrays) -> None:
        """See `CutPeer`."""
        comm = self.setting.comm
        if comm.rank:
            for array in cut.arrays.values():
                comm.Send(array, dest=0)
        else:
            ceilings.write_buffered(self.path / "all", self._wholes(cut))
        comm.Barrier()

    def _wholes(self, cut: CutArrays) -> Iterator[np.ndarray]:
        comm = self.setting.comm
        boxes = [cut.ranges(rank, cut.dims, cut.side) for rank in range(1, comm.size)]
        whole = np.empty((cut.side, cut.side), np.float32)
        for array in cut.arrays.values():
            whole[cut.box] = array
            for rank, (rows, columns) in enumerate(boxes, start=1):
                part = np.empty((rows[1] - rows[0], columns[1] - columns[0]), np.float32)
                comm.Recv(part, source=rank)
                whole[slice(*rows), slice(*columns)] = part
            yield whole


class CollectiveFile(CutPeer):
    """MPI-IO: one shared file, in which a file view puts the rows of each box."""

    name = names.MPI_IO
    is_durable = True

    def save(self, cut: CutArrays) -> None:
        """See `CutPeer`."""
        from mpi4py import MPI

        comm = self.setting.comm
        starts, shape = (cut.rows[0], cut.columns[0]), (cut.side, cut.side)
        file = MPI.File.Open(
            comm, str(self.path / "all"), MPI.MODE_CREATE | MPI.MODE_WRONLY
        )
        for number, array in enumerate(cut.arrays.values()):
            view = MPI.FLOAT.Create_subarray(shape, array.shape, starts)
            view.Commit()
            file.Set_view(number * cut.side**2 * array.itemsize, MPI.FLOAT, view)
            file.Write_all(array)
            view.Free()
        file.Sync()
        file.Close()


class DistributedTensors(CutPeer):
    """torch.distributed.checkpoint of DTensors, whose local tensors are the boxes."""

    name = names.DCP
    package = "torch"
    can_load = True

    def __init__(self, setting: Setting, path: Path) -> None:
        super().__init__(setting, path)
        self._meshes: dict[tuple[int, int], Any] = {}
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
        join_group(setting)

    def save(self, cut: CutArrays) -> None:
        """See `CutPeer`."""
        from torch.distributed.checkpoint.state_dict_saver import save

        save(self._tensors(cut), checkpoint_id=self.path)

    def load(self, cut: CutArrays) -> None:
        """See `CutPeer`."""
        from torch.distributed.checkpoint.state_dict_loader import load

        load(self._tensors(cut), checkpoint_id=self.path)

    def _tensors(self, cut: CutArrays) -> dict[str, Any]:
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        if cut.dims not in self._meshes:
            self._meshes[cut.dims] = init_device_mesh("cpu", cut.dims)
        mesh = self._meshes[cut.dims]
        make: Any = torch.from_numpy
        # The mesh cuts rows by its first dimension, columns by its second.
        return {
            name: DTensor.from_local(make(array), mesh, [Shard(0), Shard(1)])
            for name, array in cut.arrays.items()
        }


class Chunks(CutPeer):
    """TensorStore: a Zarr array with one chunk for each box, and no compression."""

    name = names.TENSORSTORE
    package = "tensorstore"
    can_load = True

    def save(self, cut: CutArrays) -> None:
        """See `CutPeer`."""
        comm = self.setting.comm
        if comm.rank == 0:
            self._open(cut, create=True)
        comm.Barrier()
        stores = self._open(cut)
        for done in [
            stores[name][cut.box].write(array) for name, array in cut.arrays.items()
        ]:
            done.result()

    def load(self, cut: CutArrays) -> None:
        """See `CutPeer`."""
        stores = self._open(cut)
        for done in [
            (array, stores[name][cut.box].read()) for name, array in cut.arrays.items()
        ]:
            np.copyto(done[0], done[1].result())

    def _open(self, cut: CutArrays, *, create: bool = False) -> dict[str, Any]:
        import tensorstore

        (first, *_) = cut.arrays.values()
        metadata = {
            "shape": [cut.side, cut.side],
            "data_type": "float32",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(first.shape)},
            },
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        return {
            name: tensorstore.open(
                {
                    "driver": "zarr3",
                    "kvstore": {"driver": "file", "path": f"{self.path / name}/"},
                    **({"metadata": metadata} if create else {}),
                },
                create=create,
                open=True,
            ).result()
            for name in cut.arrays
        }


_PEERS: tuple[type[CutPeer], ...] = (
    GatherToRoot,
    CollectiveFile,
    DistributedTensors,
    Chunks,
)


def available_cut(setting: Setting, title: str, *, load: bool = False) -> list[CutPeer]:
    """Return the ways that are installed; say once which are not. Collective.

    Args:
        setting: Ranks and directory.
        title: Part of the names of their directories.
        load: Only those that restore.
    """
    found = []
    for kind in _PEERS:
        if load and not kind.can_load:
            continue
        if not is_installed(setting, kind.name, kind.package):
            continue
        found.append(kind(setting, setting.directory / f"{title}-{kind.__name__}"))
    return found
