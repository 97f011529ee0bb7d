# SPDX-License-Identifier: Apache-2.0
"""Orders copies between host memory and devices after the work of the training.

A device works behind the program that gives it work: a tensor holds its value once that
work is done. Copies are made in a *lane*, a stream of their own, which any thread may use.
It is made, and told what to come after, by the thread that gives the device its work.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

__all__ = [
    *("CHUNK_BYTES", "Copy", "Lane", "DeviceLink", "Pin", "following", "is_capturing"),
    *("keeps_graphs", "land", "link_of"),
]

CHUNK_BYTES = 16 << 20
"""Bytes of a copy: while one is digested or written, the next flies. A digest block."""


class DeviceLink(Protocol):
    """What a library offers for one kind of device; decides nothing. Thread-safe."""

    def current(self, device: Any) -> Any:  # noqa: ANN401 (types of the library)
        """Return the stream to which the calling thread gives work."""

    def make_stream(self, device: Any) -> Any:  # noqa: ANN401
        """Return a new stream."""

    def record(self, stream: Any) -> Any:  # noqa: ANN401
        """Return an event that ends with the work given to a stream so far."""

    def wait(self, stream: Any, event: Any) -> None:  # noqa: ANN401
        """Let what a stream is given from now on begin after an event."""

    def finish(self, event: Any) -> None:  # noqa: ANN401
        """Return when an event has ended."""

    def copy(self, target: Any, source: Any, stream: Any) -> None:  # noqa: ANN401
        """Give a stream the copy of a tensor into another, of the same dtype and shape."""

    def calculate(self, make: Callable[[], Any], stream: Any) -> Any:  # noqa: ANN401
        """Give a stream work that makes a small tensor; return it in host memory, made."""

    def pin(self, device: Any, address: int, nbytes: int) -> bool:  # noqa: ANN401
        """Let devices reach host memory by themselves; return whether they may.

        The device is one that the process uses: no other is touched.
        """

    def unpin(self, device: Any, address: int) -> None:  # noqa: ANN401
        """Undo `pin`."""

    def is_capturing(self) -> bool:
        """Return whether work of the calling thread is now captured, to be replayed."""

    def keeps_graphs(self) -> bool:
        """Return whether the process may have captured work that can be replayed."""


class CudaLink:
    """CUDA, and ROCm under its name, by torch.

    A thread that the program has not given a device has the first one. Each call is made
    with the device that it concerns: CUDA would take memory on the first one for a context.
    """

    def current(self, device: Any) -> Any:  # noqa: ANN401
        """See `DeviceLink`. Not collective."""
        return _torch().cuda.current_stream(device)

    def make_stream(self, device: Any) -> Any:  # noqa: ANN401
        """See `DeviceLink`. Not collective."""
        return _torch().cuda.Stream(device)

    def record(self, stream: Any) -> Any:  # noqa: ANN401
        """See `DeviceLink`. Not collective."""
        # One for which a thread sleeps: the training needs the cores.
        event = stream.record_event(_torch().cuda.Event(blocking=True))
        return event, stream.device

    def wait(self, stream: Any, event: Any) -> None:  # noqa: ANN401
        """See `DeviceLink`. Not collective."""
        stream.wait_event(event[0])

    def finish(self, event: Any) -> None:  # noqa: ANN401
        """See `DeviceLink`. Not collective."""
        recorded, device = event
        with _torch().cuda.device(device):
            recorded.synchronize()

    def copy(self, target: Any, source: Any, stream: Any) -> None:  # noqa: ANN401
        """See `DeviceLink`. Not collective."""
        cuda = _torch().cuda
        with cuda.device(stream.device), cuda.stream(stream):
            # torch would conjugate the target on the host, before the bytes are there.
            target.copy_(source.resolve_conj().resolve_neg(), non_blocking=True)

    def calculate(self, make: Callable[[], Any], stream: Any) -> Any:  # noqa: ANN401
        """See `DeviceLink`. Not collective."""
        cuda = _torch().cuda
        with cuda.device(stream.device), cuda.stream(stream):
            return make().cpu()  # returns once the stream has done it

    def pin(self, device: Any, address: int, nbytes: int) -> bool:  # noqa: ANN401
        """See `DeviceLink`. Not collective."""
        torch = _torch()
        with torch.cuda.device(device):
            if int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0:
                return True
            # CUDA keeps the error for the next check, which would be one of the training.
            with suppress(RuntimeError):
                torch.zeros(1, device=device)
        return False

    def unpin(self, device: Any, address: int) -> None:  # noqa: ANN401
        """See `DeviceLink`. Not collective."""
        cuda = _torch().cuda
        with cuda.device(device):
            cuda.cudart().cudaHostUnregister(address)

    def is_capturing(self) -> bool:
        """See `DeviceLink`. Not collective."""
        cuda = _torch().cuda
        return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())

    def keeps_graphs(self) -> bool:
        """See `DeviceLink`. Not collective."""
        if not _torch().cuda.is_initialized():
            return False
        # A captured graph has a pool of memory of its own as long as it can be replayed.
        segments = _torch().cuda.memory_snapshot()
        return any(tuple(one.get("segment_pool_id", (0, 0))) != (0, 0) for one in segments)


_LINKS: dict[str, DeviceLink] = {"cuda": CudaLink()}


def link_of(tensor: Any) -> DeviceLink | None:  # noqa: ANN401 (a torch tensor)
    """Return the link to the device of a tensor.

    Not collective. Thread-safe.

    Returns:
        None for host memory, and for devices that torch copies from and to by itself.
    """
    return None if tensor.is_cpu else _LINKS.get(tensor.device.type)


def is_capturing() -> bool:
    """Return whether work of the calling thread for a device is now captured.

    Not collective. Thread-safe. Only where torch is imported.
    """
    return any(link.is_capturing() for link in _LINKS.values())


def keeps_graphs() -> bool:
    """Return whether captured work may be replayed in this process.

    Not collective. Thread-safe. Only where torch is imported.
    """
    return any(link.keeps_graphs() for link in _LINKS.values())


@dataclass(frozen=True, slots=True)
class Lane:
    """The stream in which the copies from a device are made.

    Attributes:
        link: The link to it.
        device: The device.
        stream: The stream.
    """

    link: DeviceLink
    device: Any
    stream: Any

    @classmethod
    def of(cls, link: DeviceLink, device: Any) -> Lane:  # noqa: ANN401
        """Return the lane of a device: the same for all threads. Not collective."""
        with _lock:
            key = id(link), device
            if key not in _lanes:
                _lanes[key] = cls(link, device, link.make_stream(device))
            return _lanes[key]

    def follow(self) -> None:
        """Let copies begin after what the calling thread has given the device to do.

        Not collective. Within `following` that is decided at the end of the block.
        """
        if _thread.lanes is not None:
            _thread.lanes[id(self)] = self
        else:
            self._follow_now()

    def _follow_now(self) -> None:
        event = self.link.record(self.link.current(self.device))
        self.link.wait(self.stream, event)


_lanes: dict[tuple[int, Any], Lane] = {}
_lock = threading.Lock()


class _ThisThread(threading.local):
    lanes: dict[int, Lane] | None = None


_thread = _ThisThread()


@contextmanager
def following() -> Iterator[None]:
    """Let copies of what becomes a leaf in the block begin after all work given by its end.

    Not collective. For this thread. One event for each device instead of for each leaf.
    """
    if _thread.lanes is not None:
        yield
        return
    lanes = _thread.lanes = {}
    try:
        yield
    finally:
        _thread.lanes = None
    for lane in lanes.values():
        lane._follow_now()  # noqa: SLF001 (its own)


class Copy(NamedTuple):
    """A copy from a device to host memory.

    Attributes:
        begin: Gives it to the lane; holds the tensors, which are kept until it has ended.
        lane: The lane in which it is made.
        data: The host memory.
    """

    begin: Callable[[], None]
    lane: Lane
    data: memoryview


def land(copies: Iterable[Copy]) -> Generator[Copy]:
    """Make copies, and yield each in turn when its bytes are there, while the next fly.

    Not collective. The next copy is taken from ``copies`` and begun before one is yielded:
    at most those of two chunks of ``CHUNK_BYTES`` are not yielded yet.

    Args:
        copies: Where to copy from, and to. They are kept until their bytes are there, also
            if the caller ends this generator early.
    """
    flying: deque[tuple[list[Copy], Any]] = deque()
    try:
        for group in _chunks(copies):
            lane = group[0].lane
            flying.append((group, None))  # kept from before the first of them flies
            for copy in group:
                copy.begin()
            flying[-1] = group, lane.link.record(lane.stream)
            if len(flying) > 1:
                yield from _landed(flying)
        while flying:
            yield from _landed(flying)
    finally:
        # INVARIANT: no memory is given back as long as a device may write or read it.
        for group, event in flying:
            lane = group[0].lane
            lane.link.finish(lane.link.record(lane.stream) if event is None else event)


def _landed(flying: deque[tuple[list[Copy], Any]]) -> Iterator[Copy]:
    group, event = flying[0]
    group[0].lane.link.finish(event)
    flying.popleft()
    yield from group


def _chunks(copies: Iterable[Copy]) -> Iterator[list[Copy]]:
    """Join copies of the same lane up to the bytes of a chunk."""
    group: list[Copy] = []
    nbytes = 0
    for copy in copies:
        if group and (
            copy.lane is not group[0].lane or nbytes + len(copy.data) > CHUNK_BYTES
        ):
            yield group
            group, nbytes = [], 0
        group.append(copy)
        nbytes += len(copy.data)
    if group:
        yield group


class Pin:
    """Host memory that devices reach by themselves, until `release`.

    Args:
        lane: The lane of a device that the process uses.
        address: Address of the memory.
        nbytes: Its length in bytes.

    Attributes:
        is_held: Whether they do; if the system refuses it, copies take longer.
    """

    def __init__(self, lane: Lane, address: int, nbytes: int) -> None:
        self._lane, self._address = lane, address
        self.is_held = lane.link.pin(lane.device, address, nbytes)

    def release(self) -> None:
        """Undo it, before the memory is unmapped. Not collective. Callable twice."""
        if self.is_held:
            self.is_held = False
            self._lane.link.unpin(self._lane.device, self._address)


def _torch() -> Any:  # noqa: ANN401 (imported by those who have tensors)
    return sys.modules["torch"]
