# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the bytes of tensors on a device, a chunk at a time."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpi_ckpt import devices
from mpi_ckpt.devices import Copy, Lane, land
from mpi_ckpt.leaves.digest import split_blocks
from mpi_ckpt.leaves.leaf import copy_bytes
from mpi_ckpt.memory import Arena
from mpi_ckpt.states.buffers.tensor_bytes import TensorBuffer, flat_bytes, ordinary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.leaves.buckets import Readable

# On the way to a device one half is filled while the other flies.
_SENT_BYTES = 4 << 20


def buffer_of(tensor: torch.Tensor, owner: torch.Tensor | None = None) -> TensorBuffer:
    """Return the bytes of a tensor, as they are after all work given to its device so far.

    Not collective. Called by the thread that gives the device its work.

    Args:
        tensor: The tensor.
        owner: DTensor whose local part has it; None for an ordinary tensor.
    """
    link = devices.link_of(tensor)
    if link is None:
        return TensorBuffer(tensor, owner)
    lane = Lane.of(link, tensor.device)
    lane.follow()
    return DeviceBuffer(tensor, owner, lane)


class DeviceBuffer(TensorBuffer):
    """The bytes of a tensor on a device that has a lane.

    Not collective. It may be read on any thread; written only on the thread that gives the
    device its work.

    Args:
        tensor: The tensor.
        owner: As for `TensorBuffer`.
        lane: The lane in which it is read, which follows what the tensor waits for.

    Attributes:
        lane: The same.
    """

    def __init__(
        self, tensor: torch.Tensor, owner: torch.Tensor | None, lane: Lane
    ) -> None:
        super().__init__(tensor, owner)
        self.lane = lane

    def view(self) -> memoryview | None:
        """Return nothing: it is no host memory."""
        return None

    def host_bytes(self) -> NDArray[np.uint8] | None:
        """Return nothing: it is no host memory."""
        return None

    def read(self) -> memoryview:
        """Return a copy of the bytes."""
        data = np.empty(self._tensor.nbytes, np.uint8).data
        self.copy_to(data)
        return data.toreadonly()

    @staticmethod
    def read_all(buffers: Sequence[TensorBuffer]) -> Sequence[Readable]:
        """Return copies of the bytes of each tensor, which fly at the same time."""
        data = np.empty(sum(one._tensor.nbytes for one in buffers), np.uint8).data  # noqa: SLF001
        views, copies, end = [], [], 0
        for one in buffers:
            assert isinstance(one, DeviceBuffer)
            start, end = end, end + one._tensor.nbytes  # noqa: SLF001 (its own)
            views.append(data[start:end])
            copies += one.copies(views[-1])
        for _ in land(copies):
            pass
        return views

    @staticmethod
    def join_all(buffers: Sequence[TensorBuffer], target: memoryview) -> bool:  # noqa: ARG004
        """Return False: their copies fly at the same time in `read_all`."""
        return False

    @staticmethod
    def write_all(buffers: Sequence[TensorBuffer], data: memoryview) -> bool:  # noqa: ARG004
        """Return False: they are written one by one."""
        return False

    def copy_to(self, target: memoryview) -> None:
        """Copy the bytes, and return when they are there."""
        for _ in land(self.copies(target)):
            pass

    def copies(self, target: memoryview) -> list[Copy]:
        """Return the copies that bring the bytes to host memory, for `land`.

        Args:
            target: The host memory, of the same length.
        """
        if not self._tensor.numel():
            return []
        with ordinary():
            if not self._is_flat():  # in one go: torch puts the elements in order
                like = torch.frombuffer(target, dtype=self._tensor.dtype)
                return [self._copy(self._tensor, like.view(self._tensor.shape), target)]
            chunks = split_blocks(target, devices.CHUNK_BYTES)
            sources = _chunks_of(self._tensor)
            return [
                self._copy(source, torch.frombuffer(chunk, dtype=torch.uint8), chunk)
                for source, chunk in zip(sources, chunks, strict=True)
            ]

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces, the next of which fly meanwhile.

        A piece is overwritten once the next one has been asked for.
        """
        if not self._is_flat():
            yield self.read()
            return
        with (
            _two_halves(self.lane) as halves,
            closing(land(self._halved(halves))) as landed,
        ):
            for copy in landed:
                yield copy.data

    def _halved(self, halves: Sequence[memoryview]) -> Iterator[Copy]:
        if not self._tensor.numel():
            return
        with ordinary():
            sources = _chunks_of(self._tensor)
        for source, half in zip(sources, cycle(halves), strict=False):
            data = half[: source.nbytes]
            with ordinary():
                target = torch.frombuffer(data, dtype=torch.uint8)
            yield self._copy(source, target, data)

    def _copy(self, source: torch.Tensor, target: torch.Tensor, data: memoryview) -> Copy:
        return Copy(partial(_begin, self.lane, target, source), self.lane, data)

    @property
    def takes_parts(self) -> bool:
        """Whether `write_part` can be called."""
        return self._is_flat()

    def write(self, data: memoryview) -> None:
        """Write bytes into the tensor."""
        if self._is_flat():
            self.write_part(0, data)
        else:
            super().write(data)

    def write_part(self, start: int, data: memoryview) -> None:
        """Write some of the bytes, and return when they are there.

        Args:
            start: First byte to write.
            data: The bytes.
        """
        if not len(data):
            return
        tensor, lane = self._tensor, self.lane
        # In the stream of the training: neither overtakes the other.
        stream = lane.link.current(lane.device)
        events: dict[int, Any] = {}
        with _two_halves(lane) as halves:
            try:
                for number, piece in enumerate(split_blocks(data, _SENT_BYTES)):
                    half = halves[number % 2][: len(piece)]
                    if number % 2 in events:
                        lane.link.finish(events[number % 2])
                    copy_bytes(piece, half)
                    with ordinary(), torch.inference_mode(tensor.is_inference()):
                        source = torch.frombuffer(half, dtype=torch.uint8)
                        first = start + number * _SENT_BYTES
                        target = flat_bytes(tensor)[first : first + len(piece)]
                        lane.link.copy(target, source, stream)
                    events[number % 2] = lane.link.record(stream)
            finally:
                # INVARIANT: the halves are not given back while the device reads them.
                for event in events.values():
                    lane.link.finish(event)

    def part(self, index: tuple[slice, ...]) -> TensorBuffer:
        """Return a box of the tensor, as `TileBuffer` says."""
        with ordinary():
            return DeviceBuffer(self._tensor[index], self._owner, self.lane)

    def _is_flat(self) -> bool:
        tensor = self._tensor
        return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _chunks_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    flat, length = flat_bytes(tensor), devices.CHUNK_BYTES
    return [flat[start : start + length] for start in range(0, len(flat), length)]


def _begin(lane: Lane, target: torch.Tensor, source: torch.Tensor) -> None:
    with ordinary():
        lane.link.copy(target, source, lane.stream)


class _Halves:
    """Two chunks of host memory that the devices of a link reach by themselves."""

    def __init__(self, lane: Lane) -> None:
        self.link = lane.link
        self._arena = Arena()
        nbytes = devices.CHUNK_BYTES
        memory = self._arena.take(2 * nbytes)
        self._arena.pin(lane)
        self.both = (memory[:nbytes], memory[nbytes : 2 * nbytes])


_spare: list[_Halves] = []
_lock = threading.Lock()


@contextmanager
def _two_halves(lane: Lane) -> Iterator[tuple[memoryview, memoryview]]:
    """Lend two chunks. They are kept for the next one: to pin memory takes longer."""
    with _lock:
        found = next((one for one in _spare if one.link is lane.link), None)
        if found is not None:
            _spare.remove(found)
    halves = found or _Halves(lane)
    try:
        yield halves.both
    finally:
        with _lock:
            _spare.append(halves)
