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
from mpi_ckpt.leaves.leaf import copy_bytes
from mpi_ckpt.memory import Arena
from mpi_ckpt.states.buffers.fingerprint import count_rows, finish, row_sums
from mpi_ckpt.states.buffers.tensor_bytes import TensorBuffer, flat_bytes, ordinary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

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
    def fingerprint_all(buffers: Sequence[DeviceBuffer]) -> list[bytes] | None:
        """Return a fingerprint of the bytes of each tensor, made where they are.

        Returns:
            None if a device lacks the memory for it.
        """
        of_lane: dict[int, list[int]] = {}
        for number, buffer in enumerate(buffers):
            of_lane.setdefault(id(buffer.lane), []).append(number)
        found: dict[int, bytes] = {}
        for numbers in of_lane.values():
            lane, tensors = buffers[numbers[0]].lane, [buffers[n]._tensor for n in numbers]  # noqa: SLF001
            try:
                sums = lane.link.calculate(partial(_all_sums, tensors), lane.stream).numpy()
            except torch.OutOfMemoryError:
                return None
            end = 0
            for number, tensor in zip(numbers, tensors, strict=True):
                start, end = end, end + count_rows(tensor.nbytes)
                found[number] = finish(sums[start:end], tensor.nbytes)
        return [found[number] for number in range(len(buffers))]

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
        made, end = [], 0
        for box in self._boxes(devices.CHUNK_BYTES):
            start, end = end, end + box.nbytes
            made.append(self._copy(box, target[start:end]))
        return made

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces, the next of which fly meanwhile.

        A piece is overwritten once the next one has been asked for.
        """
        with (
            _two_halves(self.lane) as halves,
            closing(land(self._halved(halves))) as landed,
        ):
            for copy in landed:
                yield copy.data

    def _halved(self, halves: Sequence[memoryview]) -> Iterator[Copy]:
        boxes = self._boxes(devices.CHUNK_BYTES)
        for box, half in zip(boxes, cycle(halves), strict=False):
            yield self._copy(box, half[: box.nbytes])

    def _copy(self, source: torch.Tensor, data: memoryview) -> Copy:
        begin = partial(_begin, self.lane, _elements(data, source), source)
        return Copy(begin, self.lane, data)

    def _boxes(self, nbytes: int) -> list[torch.Tensor]:
        """Return the elements as boxes of so many bytes at most, in order."""
        if not self._tensor.numel():
            return []
        with ordinary():
            if not self._is_flat():
                return list(_boxes_of(self._tensor, nbytes))
            return _slices_of(flat_bytes(self._tensor), nbytes)

    @property
    def takes_parts(self) -> bool:
        """Whether `write_part` can be called."""
        return self._is_flat()

    def write(self, data: memoryview) -> None:
        """Write bytes into the tensor, and return when they are there."""
        with torch.inference_mode(self._tensor.is_inference()):
            self._send(self._boxes(_SENT_BYTES), data)

    def write_part(self, start: int, data: memoryview) -> None:
        """Write some of the bytes, and return when they are there.

        Args:
            start: First byte to write.
            data: The bytes.
        """
        if not len(data):
            return
        with ordinary(), torch.inference_mode(self._tensor.is_inference()):
            target = flat_bytes(self._tensor)[start : start + len(data)]
            self._send(_slices_of(target, _SENT_BYTES), data)

    def _send(self, boxes: Iterable[torch.Tensor], data: memoryview) -> None:
        """Write bytes into boxes: one half is filled while the other flies."""
        lane, end = self.lane, 0
        # In the stream of the training: neither overtakes the other.
        stream = lane.link.current(lane.device)
        events: dict[int, Any] = {}
        with _two_halves(lane) as halves:
            try:
                for number, box in enumerate(boxes):
                    start, end = end, end + box.nbytes
                    half = halves[number % 2][: box.nbytes]
                    if number % 2 in events:
                        lane.link.finish(events[number % 2])
                    copy_bytes(data[start:end], half)
                    with ordinary(), torch.inference_mode(self._tensor.is_inference()):
                        lane.link.copy(box, _elements(half, box), stream)
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


def _all_sums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    with ordinary():
        # Strided elements are put in order there, one tensor at a time.
        ordered = (one.resolve_conj().resolve_neg().contiguous() for one in tensors)
        return row_sums(flat_bytes(one) for one in ordered if one.numel())


def _boxes_of(tensor: torch.Tensor, nbytes: int) -> Iterator[torch.Tensor]:
    """Yield boxes of whole rows, of so many bytes at most."""
    if tensor.nbytes <= nbytes:
        yield tensor
        return
    row_bytes = tensor.nbytes // len(tensor)
    if row_bytes > nbytes:
        for row in tensor:
            yield from _boxes_of(row, nbytes)
        return
    yield from _slices_of(tensor, nbytes // row_bytes)


def _slices_of(tensor: torch.Tensor, rows: int) -> list[torch.Tensor]:
    return [tensor[start : start + rows] for start in range(0, len(tensor), rows)]


def _elements(data: memoryview, like: torch.Tensor) -> torch.Tensor:
    """Return host memory as elements of a dtype and shape."""
    with ordinary():
        return torch.frombuffer(data, dtype=like.dtype).view(like.shape)


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
