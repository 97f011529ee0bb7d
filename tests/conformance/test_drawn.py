# SPDX-License-Identifier: Apache-2.0
"""Modules and optimizers of any making come back with the same bits, or are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parameter import is_lazy

from mpi_ckpt import ModuleState, OptimizerState, TrainState
from mpi_ckpt.errors import StageError, StateMismatchError
from tests.conformance.drawn import PLANS, Plan, regrouped, tunings
from tests.making import carry
from tests.values import alike, bits


def contents(module: nn.Module) -> dict[str, Any]:
    """Return all entries, and the buffers that are none."""
    return readable({**dict(module.named_buffers()), **module.state_dict()})


def saved_entries(module: nn.Module) -> dict[str, Any]:
    return readable(module.state_dict())


def readable(entries: dict[str, Any]) -> dict[str, Any]:
    """Return what can be copied and compared in place of what has no plain bytes."""
    found = {}
    for key, value in entries.items():
        if isinstance(value, torch.Tensor) and is_lazy(value):
            found[key] = "no shape yet"
        elif isinstance(value, torch.Tensor) and value.is_sparse:
            found[key] = value.to_dense()
        else:
            found[key] = value
    return found


def places(module: nn.Module) -> list[tuple[int, int]]:
    """Return who the parameters are and where they lie."""
    there = [p for p in module.parameters() if not is_lazy(p)]
    return [(id(p), p.data_ptr()) for p in there]


@given(PLANS)
def test_any_module_comes_back_in_place_or_is_refused(plan: Plan):
    saved, live = plan.make(1), plan.make(2)
    before, where = copy.deepcopy(contents(live)), places(live)
    if plan.is_refused:
        with pytest.raises(StageError, match=r"\b(odd|weight|running_mean|_extra_state)\b"):
            carry(ModuleState("m", saved), ModuleState("m", live))
        assert alike(contents(live), before)
        return
    carry(ModuleState("m", saved), ModuleState("m", live))
    assert alike(saved_entries(live), saved_entries(saved))
    assert places(live) == where
    scratch = [key for key in before if key not in saved.state_dict()]
    assert alike({k: contents(live)[k] for k in scratch}, {k: before[k] for k in scratch})


@given(PLANS, PLANS)
def test_a_module_of_another_making_is_refused_and_not_changed(plan: Plan, other: Plan):
    saved, live = plan.make(1), other.make(2)
    before = copy.deepcopy(contents(live))
    try:
        carry(ModuleState("m", saved), ModuleState("m", live))
    except (StageError, StateMismatchError):
        assert alike(contents(live), before)
    else:
        given, found = values(saved_entries(saved)), values(saved_entries(live))
        # One that is there under two names has a second that was not saved.
        assert alike({key: found.get(key) for key in given}, given)
        assert len(places(live)) == len(places(saved))


def values(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the bits of entries, as another making may lie in memory in another order."""
    return {
        key: (value.dtype, tuple(value.shape), bits(value))
        if torch.is_tensor(value)
        else value
        for key, value in sorted(entries.items())
    }


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        gradient = torch.rand(parameter.shape, generator=stream).to(parameter.dtype)
        parameter.grad = gradient if parameter.requires_grad else None
    optimizer.step()


def trainable(plan: Plan) -> bool:
    if plan.is_refused:
        return False
    return any(p.requires_grad and p.numel() for p in plan.make(1).parameters())


@given(PLANS.filter(trainable), st.data(), st.booleans())
def test_any_optimizer_goes_on_by_names_in_any_order(plan: Plan, data: Any, begun: bool):
    saved, live = plan.make(1), plan.make(2)
    tuning = data.draw(tunings(saved))
    first, second = tuning.make(saved), data.draw(regrouped(tuning)).make(live)
    step(saved, first, 1)
    if begun:
        step(live, second, 9)
    if tuning.told:
        carry(ModuleState("m", saved), ModuleState("m", live))
        carry(OptimizerState("o", first), OptimizerState("o", second))
    else:
        carry(
            TrainState(module=saved, optimizer=first),
            TrainState(module=live, optimizer=second),
        )
    for seed in (2, 3):
        assert alike(saved_entries(live), saved_entries(saved))
        assert alike(by_name(live, second), by_name(saved, first))
        step(saved, first, seed)
        step(live, second, seed)


def by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what an optimizer keeps for each parameter, and its groups without them."""
    names = {id(param): name for name, param in module.named_parameters()}
    kept = {names[id(param)]: dict(entry) for param, entry in optimizer.state.items()}
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    return {"state": dict(sorted(kept.items())), "groups": groups}


@given(PLANS.filter(trainable), st.data())
def test_an_optimizer_of_another_making_is_refused_and_not_changed(plan: Plan, data: Any):
    saved, live = plan.make(1), plan.make(2)
    tuning, other = data.draw(tunings(saved)), data.draw(tunings(live))
    first, second = tuning.make(saved), other.make(live)
    step(saved, first, 1)
    step(live, second, 2)
    before = copy.deepcopy([contents(live), by_name(live, second)])
    same = tuning.kind == other.kind and (
        list(map(set, tuning.groups)) == list(map(set, other.groups))
    )
    try:
        carry(
            TrainState(module=saved, optimizer=first),
            TrainState(module=live, optimizer=second),
        )
    except StateMismatchError:
        assert not same
        assert alike([contents(live), by_name(live, second)], before)
    else:
        assert same
