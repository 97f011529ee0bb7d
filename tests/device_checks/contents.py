# SPDX-License-Identifier: Apache-2.0
"""Checks of what a save and a restore hold."""

from __future__ import annotations

import torch

from mpi_ckpt import Block, ObjectState, RNGState, ShardedArrayState, TrainState
from mpi_ckpt.errors import StageError
from tests.device_checks.bench import are_equal, check, fingerprint, values

_DTYPES = (
    *("bool", "uint8", "int8", "float16", "bfloat16", "float32", "float64", "complex64"),
    *("float8_e4m3fn", "float8_e5m2"),
)


@check
def round_trip(bench):
    """Model, moments and the random stream of the device come back bit for bit."""
    module, optimizer = bench.model()
    with bench.manager(TrainState(module, optimizer), RNGState()) as checkpoints:
        checkpoints.save(step=1)
        wanted = values(module, optimizer)
        drawn = torch.rand(4, device=bench.device).cpu()
        bench.step(module, optimizer)
        checkpoints.restore()
        assert are_equal(wanted, values(module, optimizer)), "bytes"
        again = torch.rand(4, device=bench.device).cpu()
        assert torch.equal(drawn, again), "random stream of the device"
    return f"{sum(one.nbytes for one in wanted):,} bytes in {len(wanted)} tensors"


@check
def dtypes_and_strides(bench):
    """Tensors of all dtypes, and one that is not contiguous."""
    ones = torch.randint(0, 2, (33, 17), device=bench.device)
    tensors = {
        name: ones.to(torch.float32).to(dtype)
        for name in _DTYPES
        if (dtype := getattr(torch, name, None)) is not None
    }
    tensors["strided"] = torch.arange(100.0, device=bench.device).view(10, 10).t()[::2]
    state = ObjectState("tensors", dict(tensors))
    with bench.manager(state) as checkpoints:
        checkpoints.save(step=1)
        state.value = {name: torch.zeros_like(one) for name, one in tensors.items()}
        checkpoints.restore()
    for name, tensor in tensors.items():
        found = state.value[name].cpu().contiguous().view(torch.uint8)
        assert torch.equal(found, tensor.cpu().contiguous().view(torch.uint8)), name
    return f"{len(tensors)} tensors"


@check
def step_on_another_stream(bench):
    """A save right after a late step on another stream holds what the step made."""
    module, optimizer = bench.model(64 if bench.is_real else 8)
    wrong = 0
    options = {"asynchronous": True}
    with bench.manager(TrainState(module, optimizer), **options) as checkpoints:
        for number in range(5):
            with bench.another_stream():
                bench.late()
                bench.step(module, optimizer)
                checkpoints.save(step=number)
            checkpoints.wait()
            bench.synchronize()
            wanted = values(module, optimizer)
            checkpoints.restore()
            wrong += not are_equal(wanted, values(module, optimizer))
    assert not wrong, f"{wrong} of 5 saves are early"
    return "5 saves"


@check
def overlap_holds_back_the_step(bench):
    """With overlap, a save holds what was there, though the next step follows at once."""
    module, optimizer = bench.model(64 if bench.is_real else 8)
    state = TrainState(module, optimizer, overlap=True)
    with bench.manager(state, asynchronous=True, sync=False) as checkpoints:
        for number in range(5):
            wanted = values(module, optimizer)
            checkpoints.save(step=number)
            bench.step(module, optimizer)
            checkpoints.wait()
            checkpoints.restore()
            assert are_equal(wanted, values(module, optimizer)), f"save {number}"
    return "5 saves"


@check
def replay_is_refused_with_overlap(bench):
    """A captured step() makes overlapped saves fail."""
    bench.need_device()
    module, optimizer = bench.model(16, capturable=True)
    state = TrainState(module, optimizer, overlap=True)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    inputs = torch.randn(16, module[0].in_features, device=bench.device)
    with torch.cuda.graph(graph):
        module(inputs).square().mean().backward()
        optimizer.step()
    refused = 0
    with bench.manager(state, asynchronous=True, sync=False) as checkpoints:
        for number in range(3):
            try:
                checkpoints.save(step=number)
                graph.replay()
            except StageError:
                refused += 1
    assert refused == 3, f"{3 - refused} of 3 saves were not refused"
    return "3 of 3 refused"


@check
def one_bit_on_one_rank(bench):
    """A sync finds one flipped bit on the last rank, and heals it."""
    module, optimizer = bench.model(16 if bench.is_real else 4)
    with bench.manager(TrainState(module, optimizer)) as checkpoints:
        checkpoints.sync()
        wanted = values(module, optimizer)
        if bench.comm.rank == bench.comm.size - 1:
            module[0].weight.data.view(torch.int32).view(-1)[7] ^= 1
        report = checkpoints.sync()
    assert bench.comm.size == 1 or report.differing, "not seen"
    assert are_equal(wanted, values(module, optimizer)), "not healed"
    return f"{report.bytes_sent:,} bytes sent"


@check
def fingerprints_are_those_of_the_host(bench):
    """A device and the host make the same of the same bytes, of any length and layout."""
    torch.manual_seed(1)
    count = 0
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.complex64):
        for length in (1, 3, 16_384, 65_537, 1_048_576, 1_048_579, 5_000_001):
            tensor = torch.randint(0, 127, (length + 1,), device=bench.device).to(dtype)
            for one in (tensor, tensor[1:], tensor[::3]):
                there, here = fingerprint(one), fingerprint(one.cpu())
                assert there == here, f"{dtype}, {length} elements"
                count += 1
    flipped = tensor.clone()
    flipped.view(torch.uint8)[-1] ^= 1
    assert fingerprint(flipped) != fingerprint(tensor)
    return f"{count} tensors"


@check
def sync_after_a_late_step(bench):
    """What is compared is what a late step on another stream has made."""
    tensor = torch.zeros(1 << 20, device=bench.device)
    state = ObjectState("late", {"x": tensor})
    with bench.manager(state) as checkpoints:
        for number in range(3):
            with bench.another_stream():
                bench.late()
                tensor += bench.comm.rank + 1
                report = checkpoints.sync()
            bench.synchronize()
            differs = bool(report.differing)
            assert differs == (bench.comm.size > 1), f"sync {number}"
            assert bool((tensor == number + 1).all()), f"sync {number}: not root's"
    return "3 syncs"


@check
def unchanged_leaves_are_shared(bench):
    """A save shares what has kept its fingerprint, and writes what has changed."""
    values = {name: torch.randn(1 << 20, device=bench.device) for name in "abc"}
    state = ObjectState("values", values)
    with bench.manager(state) as checkpoints:
        checkpoints.sync()
        checkpoints.save(step=0)
        state.value["b"].mul_(2)
        report = checkpoints.save(step=1)
        wanted = [one.clone() for one in state.value.values()]
        for one in state.value.values():
            one.zero_()
        checkpoints.restore()
    assert report.bytes_reused == 2 << 22, f"{report.bytes_reused:,} bytes are shared"
    assert are_equal(wanted, list(state.value.values())), "bytes"
    return f"{report.bytes_reused:,} bytes shared"


@check
def cut_state(bench):
    """Rows cut over the ranks, with ghost cells, come back where they were."""
    rows = 1000 if bench.is_real else 50
    around = torch.randn(rows + 3, 4096 + 5, device=bench.device)
    block = Block.rows(around, bench.comm, ghosts=((1, 2), (2, 3)))
    wanted = around[1:-2, 2:-3].clone()
    with bench.manager(ShardedArrayState("field", {"x": block})) as checkpoints:
        checkpoints.save(step=1)
        around.zero_()
        checkpoints.restore()
    assert torch.equal(around[1:-2, 2:-3], wanted)
    return f"{wanted.nbytes:,} bytes on this rank"


@check
def no_memory_left_on_the_device(bench):
    """With no memory left on one rank, replicas are compared and saved all the same."""
    bench.need_device()
    state = ObjectState("values", {"x": torch.ones(1 << 22, device=bench.device)})
    taken, size = [], 1 << 30
    with bench.manager(state) as checkpoints:
        checkpoints.sync()
        torch.cuda.empty_cache()
        bench.comm.Barrier()
        if bench.comm.rank == bench.comm.size - 1:
            while size >= 1 << 20:
                try:
                    taken.append(torch.empty(size, dtype=torch.uint8, device=bench.device))
                except torch.OutOfMemoryError:
                    size //= 2
        bench.comm.Barrier()
        report = checkpoints.sync()
        checkpoints.save(step=1)
        del taken
    assert not report.differing
    return "one sync and one save"


@check
def device_to_host(bench):
    """What was saved on the device is restored on the host."""
    module, optimizer = bench.model()
    wanted = values(module, optimizer)
    with bench.manager(TrainState(module, optimizer)) as checkpoints:
        checkpoints.save(step=1)
    width = module[0].in_features
    other = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width))
    with bench.manager(TrainState(other), strict=False) as checkpoints:
        checkpoints.restore()
    assert torch.equal(wanted[0], other[0].weight.detach())
    return f"{wanted[0].nbytes:,} bytes compared"
