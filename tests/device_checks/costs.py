# SPDX-License-Identifier: Apache-2.0
"""Checks of memory and time."""

from __future__ import annotations

import resource
import statistics
import time

import torch

from mpi_ckpt import ObjectState, TrainState
from mpi_ckpt.options import IO
from tests.device_checks.bench import check

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
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=bench.is_real)

    def copy():
        pinned.copy_(tensor, non_blocking=True)
        bench.synchronize()

    state = ObjectState("large", {"x": tensor})
    options = {"asynchronous": True, "io": IO(reuse=False)}
    copies, saves = [], []
    with bench.manager(state, **options) as checkpoints:
        for number in range(_REPEATS + 1):
            copies.append(_seconds(copy))
            saves.append(_seconds(lambda step=number: checkpoints.save(step=step)))
            checkpoints.wait()
            bench.comm.Barrier()
    # The first touches fresh memory.
    copied, saved = statistics.median(copies[1:]), statistics.median(saves[1:])
    share = copied / saved
    if bench.is_real and bench.comm.size == 1:
        assert share >= 0.85, f"{share:.2f} of a page-locked copy"
    rate = tensor.nbytes / 1e9
    return (
        f"{rate / saved:.2f} GB/s, {share:.2f} of a page-locked copy's {rate / copied:.2f}"
    )


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


def _seconds(act):
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
