# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler as lr

from mpi_ckpt.errors import StageError
from mpi_ckpt.states.nested import SchedulerState
from mpi_ckpt.states.optimizer import OptimizerState
from tests.making import carry


class Warmup:
    """A callable object: LambdaLR saves what is in it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, epoch: int) -> float:
        return min(1.0, (epoch + 1) / self.steps)


KINDS = {
    "StepLR": lambda o: lr.StepLR(o, 2),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [2, 3, 3, 7]),
    "ConstantLR": lambda o: lr.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr.LinearLR(o, 0.1, total_iters=9),
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 10, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.1, 0.5, 3),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.5, 20),
    "OneCycleLR linear": lambda o: lr.OneCycleLR(o, 0.5, 20, anneal_strategy="linear"),
    "LambdaLR function": lambda o: lr.LambdaLR(o, lambda e: 0.9**e),
    "LambdaLR object": lambda o: lr.LambdaLR(o, Warmup(6)),
    "MultiplicativeLR": lambda o: lr.MultiplicativeLR(o, lambda e: 0.95),
    "SequentialLR": lambda o: lr.SequentialLR(
        o, [lr.ConstantLR(o, 0.1, 3), lr.MultiStepLR(o, [2, 4])], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr.ChainedScheduler(
        [lr.StepLR(o, 3), lr.ExponentialLR(o, 0.9)]
    ),
}


def make(kind: str):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.4, momentum=0.9)
    return optimizer, KINDS[kind](optimizer)


def rates(optimizer, scheduler, count: int) -> list[float]:
    seen = []
    for _ in range(count):
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def restore(saved: tuple, live: tuple) -> None:
    carry(OptimizerState("o", saved[0]), OptimizerState("o", live[0]))
    carry(SchedulerState("s", saved[1]), SchedulerState("s", live[1]))


@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_rates_go_on_as_in_an_uninterrupted_run(kind):
    saved, live = make(kind), make(kind)
    rates(*saved, 4)
    restore(saved, live)
    assert live[1].get_last_lr() == saved[1].get_last_lr()
    expected = rates(*saved, 8)
    assert rates(*live, 8) == expected
    assert len(set(expected)) > 1 or kind in (
        "ConstantLR",
        "MultiStepLR",
        "LambdaLR object",
    )


def test_plateau_goes_on_with_its_infinities_and_counts():
    def make_plateau():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.4)
        return optimizer, lr.ReduceLROnPlateau(optimizer, patience=2, cooldown=1)

    losses = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    for cut in range(len(losses)):
        saved, live = make_plateau(), make_plateau()
        for loss in losses[:cut]:
            saved[1].step(loss)
        restore(saved, live)
        for loss in losses[cut:]:
            saved[1].step(loss)
            live[1].step(loss)
            assert live[0].param_groups[0]["lr"] == saved[0].param_groups[0]["lr"]
        assert live[1].num_bad_epochs == saved[1].num_bad_epochs


def test_callable_object_of_lambda_gets_its_attributes_back():
    saved, live = make("LambdaLR object"), make("LambdaLR object")
    saved[1].lr_lambdas[0].steps = 50
    restore(saved, live)
    assert live[1].lr_lambdas[0].steps == 50


def test_gradient_scaler_goes_on():
    saved, live = (torch.amp.GradScaler("cpu", growth_interval=2) for _ in range(2))
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        saved.scale(parameter.sum() * factor).backward()
        saved.step(optimizer)
        saved.update()
    carry(SchedulerState("scaler", saved), SchedulerState("scaler", live))
    assert live.state_dict() == saved.state_dict()
    assert live.get_scale() == saved.get_scale() == 32768.0


def test_disabled_scaler_is_no_trouble():
    saved, live = (torch.amp.GradScaler("cpu", enabled=False) for _ in range(2))
    carry(SchedulerState("scaler", saved), SchedulerState("scaler", live))
    assert live.state_dict() == {}


def test_anything_with_a_state_dict_of_plain_values_is_held():
    class Loader:
        def __init__(self, at: int) -> None:
            self.at = at

        def state_dict(self):
            return {"at": self.at, "order": torch.arange(3)}

        def load_state_dict(self, state) -> None:
            self.at = state["at"] + int(state["order"].sum())

    live = Loader(0)
    carry(SchedulerState("loader", Loader(39)), SchedulerState("loader", live))
    assert live.at == 42


def test_state_dict_with_code_in_it_is_refused_naming_the_place():
    class Odd:
        def state_dict(self):
            return {"hook": print}

        def load_state_dict(self, state):
            raise AssertionError

    with pytest.raises(StageError, match=r"^content/hook is of type"):
        SchedulerState("s", Odd()).capture()
