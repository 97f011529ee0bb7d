# SPDX-License-Identifier: Apache-2.0
"""Broadcasts that Horovod's own refuse or get wrong, and ours beside them."""

from __future__ import annotations

import horovod.torch as hvd
import numpy as np
import torch
from mpi4py import MPI

from mpi_ckpt.integrations import horovod as beside
from tests.integrations.horovod.playing import error_of

RANK = MPI.COMM_WORLD.rank
DTYPES = (
    *("bfloat16", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
    *("uint16", "uint32", "uint64"),
)


def everywhere(value):
    """Return whether a value is the same on all ranks."""
    return len(set(MPI.COMM_WORLD.allgather(repr(value)))) == 1


def model(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def bits(*tensors):
    return [t.detach().contiguous().view(torch.uint8).tolist() for t in tensors]


def trained(optimizer, net):
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizers():
    """Params first, then the optimizer's state, as Horovod's own examples do."""
    found = {}
    for name, make in {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
        "SGD with decay": lambda p: torch.optim.SGD(
            p, lr=0.1, momentum=0.9, weight_decay=0.1
        ),
    }.items():
        for side, library in (("horovod", hvd), ("ours", beside)):
            net = model(RANK)
            optimizer = make(net.parameters())
            # As after a restore on root: only it has been given another rate.
            optimizer.param_groups[0]["lr"] = 0.1 / (RANK + 1)
            library.broadcast_parameters(net.state_dict(), root_rank=0)
            before = bits(*net.parameters())
            library.broadcast_optimizer_state(optimizer, root_rank=0)
            after = bits(*net.parameters())
            found[f"{name}, {side}"] = {
                "equal": everywhere(after),
                "unchanged": before == after,
                "gradients": [p.grad is not None for p in net.parameters()].count(True),
            }
    return found


def rates_without_state():
    found = {}
    for side, library in (("horovod", hvd), ("ours", beside)):
        optimizer = torch.optim.SGD(model(0).parameters(), lr=0.1 * (RANK + 1))
        library.broadcast_optimizer_state(optimizer, root_rank=0)
        found[side] = optimizer.param_groups[0]["lr"]
    return found


def lbfgs():
    net = model(RANK)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1)

    def loss():
        optimizer.zero_grad()
        value = net(torch.ones(2, 4)).square().sum()
        value.backward()
        return value

    if RANK == 0:
        optimizer.step(loss)
    refused = error_of(lambda: hvd.broadcast_optimizer_state(optimizer, root_rank=0))
    beside.broadcast_optimizer_state(optimizer, root_rank=0)
    state = optimizer.state_dict()["state"][0]
    return {
        "horovod": refused,
        "state": len(state["old_dirs"]) > 0,
        "equal": everywhere([bits(d) for d in state["old_dirs"]]),
    }


def distributed_optimizer():
    """Horovod's wrapper, with the state of the last root that trained."""
    net = model(RANK)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(net.parameters()), named_parameters=net.named_parameters()
    )
    trained(optimizer, net)
    for entry in optimizer.state.values():
        entry["exp_avg"] += RANK
    beside.broadcast_parameters(net.named_parameters(), root_rank=1)
    beside.broadcast_optimizer_state(optimizer, root_rank=1)
    moments = [bits(entry["exp_avg"]) for entry in optimizer.state.values()]
    equal = everywhere(moments) and everywhere(bits(*net.parameters()))
    trained(optimizer, net)  # it still trains, with all ranks
    return {"equal": equal, "still": everywhere(bits(*net.parameters()))}


def dtypes():
    found = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        raw = torch.full((3, 16), 1 - RANK if name == "bool" else RANK + 1)
        tensor = raw.to(torch.uint8).view(dtype)
        refused = error_of(lambda t=tensor: hvd.broadcast_parameters({"t": t}, root_rank=0))
        beside.broadcast_parameters({"t": tensor}, root_rank=0)
        found[name] = [refused, everywhere(bits(tensor)), bits(tensor)[0][0][0]]
    return found


def forms():
    net = model(RANK)
    turned = torch.arange(6.0).reshape(2, 3).t() + RANK
    values = {"epoch": RANK + 7, "lr": 0.5 / (RANK + 1), "w": torch.ones(2) * RANK}
    found = {
        "generator": [
            error_of(lambda: hvd.broadcast_parameters(net.named_parameters(), 0)),
            error_of(lambda: beside.broadcast_parameters(net.named_parameters(), 0)),
            everywhere(bits(*net.parameters())),
        ],
        "not contiguous": [
            error_of(lambda: hvd.broadcast_parameters({"t": turned}, 0)),
            error_of(lambda: beside.broadcast_parameters({"t": turned}, 0)),
            everywhere(turned.tolist()),
        ],
        "no tensor": [
            error_of(lambda: hvd.broadcast_parameters({"epoch": values["epoch"]}, 0)),
            error_of(lambda: beside.broadcast_parameters(values, 0)),
            (values["epoch"], values["lr"]) == (7, 0.5)
            and everywhere(values["w"].tolist()),
        ],
    }
    found["strides"] = turned.stride()
    return found


def disagreeing():
    """Ranks with other models: Horovod's error is one that its elastic run retries."""
    tensor = torch.ones(2 + RANK)
    theirs = error_of(lambda: hvd.broadcast_parameters({"t": tensor}, 0))
    return {
        "horovod": theirs,
        "ours": error_of(lambda: beside.broadcast_parameters({"t": tensor}, 0)),
        "untouched": tensor.tolist() == [1.0] * (2 + RANK),
    }


def more_than_two_gib(extra):
    count = (1 << 31) + extra
    # Zeros that nobody has touched: only root's last elements are written.
    tensor = torch.zeros(count, dtype=torch.int8)
    if RANK == 0:
        tensor[-extra:] = 7
    ours = error_of(lambda: beside.broadcast_parameters({"big": tensor}, 0))
    arrived = tensor[-extra:].tolist() == [7] * extra and not tensor[:extra].any()
    if RANK == 0:
        tensor[-extra:] = 9
    theirs = error_of(lambda: hvd.broadcast_parameters({"big": tensor}, 0))
    return {"ours": ours, "arrived": bool(arrived), "horovod": theirs}


def object_of_more_than_two_gib(extra, kind):
    count = (1 << 31) + extra
    value = None
    if RANK == 0:
        value = np.zeros(count, np.uint8) if kind == "array" else bytearray(count)
        value[-1] = 7
    value = beside.broadcast_object(value, 0)
    return [len(value) - count, *map(int, value[-extra:])]


def types_that_differ():
    value = {"epoch": 7, "a": np.arange(5)} if RANK == 0 else None
    found = beside.broadcast_object(value, root_rank=0)
    ours = [found["epoch"], found["a"].tolist()]
    # Told by Horovod's stall check, which the test has made short.
    return {"ours": ours, "horovod": error_of(lambda: hvd.broadcast_object(value, 0))}


def one_name_twice():
    tensors = [torch.ones(1 << 20) for _ in range(2)]

    def twice():
        handles = [hvd.broadcast_async_(t, 0, name="same") for t in tensors]
        return [hvd.synchronize(handle) for handle in handles]

    theirs = error_of(twice)
    ours = [beside.broadcast_object(i + RANK, 0, name="same") for i in range(2)]
    named = [("same", tensors[0]), ("same", tensors[1])]
    return [theirs, ours, error_of(lambda: beside.broadcast_parameters(named, 0))]


def beside_horovods_operations():
    """Both at once: ours while Horovod's are under way in its thread."""
    right = True
    for round_ in range(30):
        tensors = [torch.full((1 << 12,), float(RANK + i)) for i in range(4)]
        handles = [
            hvd.allreduce_async_(t, op=hvd.Sum, name=f"{round_}.{i}")
            for i, t in enumerate(tensors)
        ]
        value = beside.broadcast_object([round_ * (RANK + 1), np.full(1 << 18, RANK)], 1)
        right = right and value[0] == round_ * 2 and bool((value[1] == 1).all())
        for handle in handles:
            hvd.synchronize(handle)
        sums = [sum(r + i for r in range(hvd.size())) for i in range(4)]
        right = right and [int(t[-1]) for t in tensors] == sums
    return right


def play(name, *arguments):
    """Run one of the above between hvd.init() and hvd.shutdown()."""
    hvd.init()
    result = globals()[name](*arguments)
    hvd.shutdown()
    return result
