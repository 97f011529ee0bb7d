# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a device: host memory, streams that work late, and what went wrong.

It proves the order of copies and how long memory is kept. A real device is not needed, and
nothing is said about one.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections import deque

import numpy as np
import torch

from mpi_ckpt import devices
from mpi_ckpt.states.buffers import device_bytes


class Event:
    def __init__(self, stream):
        self.stream = stream
        self.ended = False


class Stream:
    def __init__(self, name, *, hasty):
        self.name = name
        self.hasty = hasty
        self.todo = deque()


class StandIn:
    """See `devices.DeviceLink`; its tensors are those of `tensor` and `move`.

    Work waits until somebody waits for it. A hasty device makes copies to the host at once,
    unless their stream waits for work that has not ended.
    """

    def __init__(self, *, hasty=False, pins=True):
        self.hasty = hasty
        self.pins = pins
        self.faults = []
        self.copied = {"to host": 0, "to device": 0}
        self.events = 0
        self.calculated = 0
        self.has_memory = True
        self.pinned = {}
        self.pin_calls = 0
        self.graphs = False
        self.capturing = False
        self._default = Stream("default", hasty=False)
        self._memory = {}
        self._thread = threading.local()
        self._lock = threading.RLock()

    # What a program does.

    def tensor(self, like):
        """Return a copy of a tensor in memory of the device."""
        flat = like.detach().contiguous()
        array = np.empty(max(flat.nbytes, 1), np.uint8)
        made = torch.from_numpy(array)
        self._memory[made.data_ptr()] = weakref.ref(array)
        made = made[: flat.nbytes].view(like.dtype).view(like.shape)
        made.copy_(flat)
        return made

    def move(self, *tensors):
        """Move tensors to the device, in place."""
        for tensor in tensors:
            tensor.data = self.tensor(tensor.data)

    def owns(self, tensor):
        return tensor.untyped_storage().data_ptr() in self._memory

    def stream(self):
        return Stream("of the program", hasty=False)

    @contextlib.contextmanager
    def on(self, stream):
        before = self.current(None)
        self._thread.stream = stream
        try:
            yield
        finally:
            self._thread.stream = before

    def work(self, act):
        """Give the current stream work, which is done later."""
        self._give(self.current(None), act)

    def synchronize(self):
        """Wait until the current stream has done its work."""
        self.finish(self.record(self.current(None)))

    # What a link does.

    def current(self, device):
        return getattr(self._thread, "stream", self._default)

    def make_stream(self, device):
        return Stream("lane", hasty=self.hasty)

    def record(self, stream):
        event = Event(stream)
        self.events += 1

        def end():
            event.ended = True

        self._give(stream, end)
        return event

    def wait(self, stream, event):
        self._give(stream, event)

    def finish(self, event):
        with self._lock:
            while not event.ended:
                self._step(event.stream)

    def copy(self, target, source, stream):
        to_host = self.owns(source)
        way = "to host" if to_host else "to device"
        self.copied[way] += source.nbytes
        # Memory of the device goes when the last tensor that has it goes; a real device
        # would then give it to another tensor.
        ours = self._memory[(source if to_host else target).untyped_storage().data_ptr()]
        kept = [ours, *([weakref.ref(target)] if to_host else [])]
        # Addresses, as a device has them: they keep nothing.
        to, start, nbytes = target.data_ptr(), source.data_ptr(), source.nbytes
        there = source if to_host else target
        strides, shape, dtype = there.stride(), there.shape, there.dtype
        offset, is_plain = there.data_ptr(), there.is_contiguous()
        sent = None if to_host else source

        def copy(_=sent):
            if any(ref() is None for ref in kept):
                self.faults.append(f"{way}: memory was given back before the copy")
                return
            if is_plain:
                _memory_at(to, nbytes)[:] = _memory_at(start, nbytes).copy()
                return
            whole = torch.from_numpy(ours())
            whole = whole[offset - whole.data_ptr() :]
            whole = whole[: len(whole) // dtype.itemsize * dtype.itemsize].view(dtype)
            elements = whole.as_strided(shape, strides)
            if to_host:
                data = elements.contiguous().view(-1).view(torch.uint8).numpy()
                _memory_at(to, nbytes)[:] = data
            else:
                data = torch.from_numpy(_memory_at(start, nbytes).copy())
                elements.copy_(data.view(dtype).view(shape))

        del target, source, sent, there
        self._give(stream, copy)

    def calculate(self, make, stream):
        if not self.has_memory:
            raise torch.OutOfMemoryError("no memory of the stand-in is left")
        made = []
        self.calculated += 1
        self._give(stream, lambda: made.append(make()))
        self.finish(self.record(stream))
        return made[0]

    def pin(self, device, address, nbytes):
        self.pin_calls += 1
        if self.pins:
            self.pinned[address] = nbytes
        return self.pins

    def unpin(self, device, address):
        _memory_at(address, 1)[0] += 0  # still mapped
        if self.pinned.pop(address, None) is None:
            self.faults.append("unpinned what was not pinned")

    def is_capturing(self):
        return self.capturing

    def keeps_graphs(self):
        return self.graphs

    # How it works.

    def _give(self, stream, what):
        with self._lock:
            stream.todo.append(what)
            while stream.hasty and stream.todo and self._is_ready(stream.todo[0]):
                self._step(stream)

    def _is_ready(self, what):
        return not isinstance(what, Event) or what.ended

    def _step(self, stream):
        what = stream.todo.popleft()
        if isinstance(what, Event):
            self.finish(what)
        else:
            what()


def _memory_at(address, nbytes):
    return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))


def install(device, monkeypatch, *, chunk_bytes=None):
    """Let the package take the stand-in's tensors for those of a device."""

    def link_of(tensor):
        return device if device.owns(tensor) else None

    monkeypatch.setattr(devices, "link_of", link_of)
    monkeypatch.setattr(devices, "_LINKS", {"stand-in": device})
    monkeypatch.setattr(devices, "_lanes", {})
    monkeypatch.setattr(device_bytes, "_spare", [])
    if chunk_bytes is not None:
        monkeypatch.setattr(devices, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(device_bytes, "_SENT_BYTES", max(1, chunk_bytes // 4))
    return device
