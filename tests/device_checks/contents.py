# SPDX-License-Identifier: Apache-2.0
"""Checks of what a save and a restore hold."""

from __future__ import annotations

import torch

from mpi_ckpt import ObjectState, RNGState, TrainState
from mpi_ckpt.errors import StageError
from tests.device_checks.bench import are_equal, check, values

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
            if bench.is_real:
                with torch.cuda.stream(torch.cuda.Stream()):
                    torch.cuda._sleep(200_000_000)  # about 0.1 s
                    bench.step(module, optimizer)
                    checkpoints.save(step=number)
            else:
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
