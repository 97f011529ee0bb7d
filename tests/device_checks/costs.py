# SPDX-License-Identifier: Apache-2.0
"""Checks of memory and time."""

from __future__ import annotations

import resource
import statistics
import time

import torch

from mpi_ckpt import ObjectState, TrainState
from mpi_ckpt.engine.save.cut.own_tiles import runs_of
from mpi_ckpt.options import IO
from mpi_ckpt.states.buffers.device_bytes import buffer_of
from mpi_ckpt.states.tensors import tensor_leaf
from tests.device_checks.bench import check, fingerprint

_REPEATS = 5
_WINDOW_BYTES = 64 << 20


@check
def host_memory_of_a_restore(bench):
    """A restore of a large tensor on a device takes windows, not the tensor."""
    state = ObjectState("large", {"x": bench.large()})
    with bench.manager(state, io=IO(window_bytes=_WINDOW_BYTES)) as checkpoints:
        checkpoints.save(step=1)
        before = _peak_bytes()
        checkpoints.restore()
        grown = _peak_bytes() - before
    nbytes = state.value["x"].nbytes
    limit = 2 * _WINDOW_BYTES + (32 << 20)
    assert not bench.is_real or nbytes < limit or grown < limit, f"{grown:,} bytes"
    return f"{grown >> 20} MiB more for a tensor of {nbytes >> 20} MiB"


@check
def rate_of_a_save(bench):
    """An asynchronous save returns at 0.85 of the rate of a page-locked copy, or more."""
    tensor = bench.large()
    copy = page_locked_copy(bench, tensor)
    state = ObjectState("large", {"x": tensor})
    options = {"asynchronous": True, "io": IO(reuse=False)}
    with bench.manager(state, **options) as checkpoints:

        def save():
            checkpoints.save()
            bench.synchronize()

        def between():
            checkpoints.wait()
            bench.comm.Barrier()

        copied, saved = medians(copy, save, between)
    share = note(bench, tensor.nbytes, page_locked_copy=copied, save_returns=saved)
    if bench.is_real and bench.comm.size == 1:
        assert share >= 0.85, f"{share:.2f} of a page-locked copy"
    return told(bench, share)


@check
def rate_of_a_restore(bench):
    """The bytes of a copy in memory reach the device; beside a page-locked copy."""
    tensor = bench.large()
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=bench.is_real)

    def copy():
        tensor.copy_(pinned, non_blocking=True)
        bench.synchronize()

    data = memoryview(pinned.numpy()).cast("B")
    buffer = buffer_of(tensor)
    copied, written = medians(copy, lambda: buffer.write(data), bench.comm.Barrier)
    return told(bench, note(bench, tensor.nbytes, page_locked_copy=copied, write=written))


@check
def rate_of_tiles(bench):
    """Rows with ghost cells leave the device in chunks; beside a page-locked copy."""
    rows = bench.mebibytes * 2**20 // (4 * 4096)
    around = torch.randn(rows, 4096 + 4, device=bench.device)
    inner = around[:, 2:-2]
    copy = page_locked_copy(bench, inner.contiguous())
    leaf = tensor_leaf("x", inner)

    def read():
        for _ in runs_of(leaf):
            pass

    copied, taken = medians(copy, read, bench.comm.Barrier)
    return told(bench, note(bench, inner.nbytes, page_locked_copy=copied, tiles=taken))


@check
def rate_of_fingerprints(bench):
    """Made on the device faster than the bytes could be copied away; beside its memory."""
    tensor = bench.large()
    copy = page_locked_copy(bench, tensor)
    other = torch.empty_like(tensor)

    def inside():
        other.copy_(tensor)
        bench.synchronize()

    copied, made = medians(copy, lambda: fingerprint(tensor), bench.comm.Barrier)
    moved, _ = medians(inside, lambda: None, bench.comm.Barrier)
    note(bench, 2 * tensor.nbytes, device_memory=moved)  # read and written
    share = note(bench, tensor.nbytes, page_locked_copy=copied, fingerprint=made)
    assert not bench.is_real or share > 1, f"{share:.2f} of a page-locked copy"
    return told(bench, share)


@check
def rate_of_a_sync(bench):
    """Equal replicas are compared without a copy; beside a page-locked copy of a rank's."""
    tensor = bench.large()
    bench.comm.Barrier()
    copy = page_locked_copy(bench, tensor)
    with bench.manager(ObjectState("large", {"x": tensor})) as checkpoints:
        checkpoints.sync()
        copied, synced = medians(copy, checkpoints.sync, bench.comm.Barrier)
    return told(bench, note(bench, tensor.nbytes, page_locked_copy=copied, sync=synced))


@check
def device_memory_of_saves(bench):
    """Saves and restores leave no memory on the device."""
    bench.need_device()
    module, optimizer = bench.model(64)
    bench.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with bench.manager(TrainState(module, optimizer), asynchronous=True) as checkpoints:
        for number in range(3):
            checkpoints.save(step=number)
            checkpoints.wait()
        checkpoints.restore()
    left = torch.cuda.memory_allocated() - before
    assert left <= 1 << 20, f"{left:,} bytes are left"
    return f"peak {(torch.cuda.max_memory_allocated() - before) >> 20} MiB more"


def _peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def page_locked_copy(bench, tensor):
    """Return a function that copies a tensor into page-locked memory."""
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=bench.is_real)

    def copy():
        pinned.copy_(tensor, non_blocking=True)
        bench.synchronize()

    return copy


def medians(one, other, between):
    """Return the seconds of two acts, in turn; the first time touches fresh memory."""
    found = [], []
    for _ in range(_REPEATS + 1):
        for act, seconds in zip((one, other), found, strict=True):
            start = time.perf_counter()
            act()
            seconds.append(time.perf_counter() - start)
        between()
    return [statistics.median(seconds[1:]) for seconds in found]


def note(bench, nbytes, **seconds):
    """Note rates in GB/s; return the last as a share of the first."""
    rates = {name: nbytes / 1e9 / one for name, one in seconds.items()}
    bench.figures.update({f"{name} GB/s": round(one, 2) for name, one in rates.items()})
    first, *_, last = [*rates.values(), *rates.values()]
    bench.figures["share"] = round(last / first, 3)
    return last / first


def told(bench, share):
    pairs = [f"{name} {value}" for name, value in bench.figures.items() if "GB" in name]
    return f"{', '.join(pairs)}; {share:.2f} of a page-locked copy"
