# SPDX-License-Identifier: Apache-2.0
"""A program that has changed since the save: what it has in common is restored, or told."""

import numpy as np
import pytest

from mpi_ckpt import ArrayState, ModuleState, ObjectState, TrainState
from mpi_ckpt.errors import RegistrationError, StateMismatchError
from tests.ranks import assert_same, manager, plain, same_error

torch = pytest.importorskip("torch")


class Extra(torch.nn.Module):
    """A module with extra state."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def network(fill, *, head=3, **more):
    layers = torch.nn.ModuleDict(
        {"body": torch.nn.Linear(4, 5), "head": torch.nn.Linear(5, head), **more}
    )
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.fill_(fill)
    return layers


def values(module):
    """Return the value each parameter is filled with."""
    return {name: p.flatten()[0].item() for name, p in module.named_parameters()}


def refused(comm, root, state, texts, *, strict=False):
    """Require a restore to be refused alike on all ranks."""
    with (
        manager(root, state, strict=strict) as checkpoints,
        same_error(comm, StateMismatchError, *texts),
    ):
        checkpoints.restore()


def saved_with(root, *states):
    with manager(root, *states) as checkpoints:
        checkpoints.save()


def test_arrays_that_only_one_side_has(comm, shared_path):
    saved_with(shared_path, ArrayState("a", {"x": np.ones(3), "old": np.ones((500, 9))}))
    arrays = {"x": np.zeros(3), "new": np.full(2, 7)}
    texts = ["old", "new", "nothing was changed"]
    refused(comm, shared_path, ArrayState("a", arrays), texts, strict=True)
    assert (arrays["x"] == 0).all()
    with manager(shared_path, ArrayState("a", arrays), strict=False) as checkpoints:
        report = checkpoints.restore()
    assert report.missing_leaves == {"a": ("new",)}
    assert report.unexpected_leaves == {"a": ("old",)}
    assert (arrays["x"] == 1).all()
    assert (arrays["new"] == 7).all()
    assert_same(comm, plain(report))


def test_parameters_that_only_one_side_has(comm, shared_path):
    old = network(1, gone=torch.nn.Linear(2, 2), mark=Extra("saved"), lost=Extra("x"))
    saved_with(shared_path, ModuleState("net", old))
    live = network(2, more=torch.nn.Linear(6, 6), mark=Extra("live"))
    with manager(shared_path, ModuleState("net", live), strict=False) as checkpoints:
        report = checkpoints.restore()
    assert set(report.missing_leaves["net"]) == {"more.weight", "more.bias"}
    assert set(report.unexpected_leaves["net"]) == {
        "gone.weight", "gone.bias", "lost._extra_state",
    }  # fmt: skip
    assert values(live) == {
        "body.weight": 1, "body.bias": 1, "head.weight": 1, "head.bias": 1,
        "more.weight": 2, "more.bias": 2,
    }  # fmt: skip
    assert live["mark"].extra == "saved"


def test_another_shape_is_never_loaded(comm, shared_path):
    saved_with(shared_path, ModuleState("net", network(1)))
    live = network(2, head=4, more=torch.nn.Linear(6, 6))
    texts = ["head.weight F32[3, 5]", "[4, 5]"]
    refused(comm, shared_path, ModuleState("net", live), texts)
    assert set(values(live).values()) == {2}
    arrays = ArrayState("a", {"x": np.zeros(3)})
    root = shared_path / "arrays"
    saved_with(root, arrays)
    for other in (np.zeros(4), np.zeros(3, "f4"), np.zeros((3, 1))):
        state = ArrayState("a", {"x": other})
        refused(comm, root, state, ["x F64[3]"])


def test_tie_to_a_parameter_that_is_gone_is_a_mismatch(comm, shared_path):
    tied = network(1, other=torch.nn.Linear(5, 3))
    tied["other"].weight = tied["head"].weight
    saved_with(shared_path, ModuleState("net", tied))
    live = torch.nn.ModuleDict({"other": torch.nn.Linear(5, 3)})
    refused(comm, shared_path, ModuleState("net", live), ["which the program lacks"])


def training(fill, *, with_scheduler, **more):
    module = network(fill, **more)
    optimizer = torch.optim.SGD(module.parameters(), lr=fill, momentum=0.9)
    module["head"](module["body"](torch.ones(1, 4))).sum().backward()
    optimizer.step()
    scheduler = None
    if with_scheduler:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    state = TrainState(module=module, optimizer=optimizer, scheduler=scheduler)
    return module, optimizer, state


@pytest.mark.parametrize("had_it", [True, False])
def test_scheduler_that_only_one_side_has(comm, shared_path, had_it):
    module, optimizer, state = training(0.5, with_scheduler=had_it)
    saved_with(shared_path, state)
    live, live_optimizer, state = training(0.25, with_scheduler=not had_it)
    refused(comm, shared_path, state, ["scheduler"], strict=True)
    with manager(shared_path, state, strict=False) as checkpoints:
        report = checkpoints.restore()
    told = report.unexpected_leaves if had_it else report.missing_leaves
    assert told == {"train": ("scheduler/*",)}
    assert values(live) == values(module)
    assert live_optimizer.param_groups[0]["lr"] == 0.5
    kept = live_optimizer.state[live["head"].bias]["momentum_buffer"]
    assert torch.equal(kept, optimizer.state[module["head"].bias]["momentum_buffer"])


def test_module_can_be_had_without_its_optimizer(comm, shared_path):
    """Other parameters: the optimizer knows of some that were not saved."""
    module, _, state = training(0.5, with_scheduler=False)
    saved_with(shared_path, state)
    live, _, state = training(0.25, with_scheduler=False, more=torch.nn.Linear(2, 2))
    refused(comm, shared_path, state, ["more.weight is in the program"])
    with manager(shared_path, TrainState(module=live), strict=False) as checkpoints:
        report = checkpoints.restore()
    assert report.unexpected_leaves == {"train": ("optimizer/*",)}
    assert report.missing_leaves == {"train": ("module/more.weight", "module/more.bias")}
    assert values(live) | values(module) == values(live)


def test_state_of_another_kind_is_a_mismatch_also_so(comm, shared_path):
    saved_with(shared_path, ObjectState("s", {"a": 1}))
    model = torch.nn.Linear(1, 1)
    for state in (ModuleState("s", model), TrainState(module=model, name="s")):
        refused(comm, shared_path, state, [])


def test_names_that_carry_the_rank_are_told_with_advice(peers, shared_path):
    state = ObjectState(f"cache-{peers.rank}")
    with same_error(peers, RegistrationError, "cache-0", "PerRankState"):
        manager(shared_path, state)


def test_names_that_carry_the_number_of_ranks_are_told_with_advice(comm, shared_path):
    saved_with(shared_path, ObjectState("cache of 7", 1))
    live = ObjectState("cache of 8", 2)
    refused(comm, shared_path, live, ["cache of 7", "PerRankState"], strict=True)
    with manager(shared_path, live, strict=False) as checkpoints:
        report = checkpoints.restore()
    assert (report.missing, report.unexpected) == (("cache of 8",), ("cache of 7",))
    assert live.value == 2
