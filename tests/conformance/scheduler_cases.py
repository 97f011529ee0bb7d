# SPDX-License-Identifier: Apache-2.0
"""Every scheduler of torch."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import lr_scheduler as lr
from torch.optim.swa_utils import SWALR

from mpi_ckpt import TrainState
from tests.conformance.subjects import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpi_ckpt.state import LeafState

STEPS = 3


class Rising:
    """A callable object: LambdaLR saves what is in it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, epoch: int) -> float:
        return min(1.0, (epoch + 1) / self.steps)


CONFIGURATIONS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "LambdaLR": {
        "function": lambda o: lr.LambdaLR(o, lambda n: 0.9**n),
        "object": lambda o: lr.LambdaLR(o, Rising(6)),
        "one for each group": lambda o: lr.LambdaLR(o, [lambda n: 0.9**n, Rising(5)]),
    },
    "MultiplicativeLR": {
        "function": lambda o: lr.MultiplicativeLR(o, lambda n: 0.95),
        "object": lambda o: lr.MultiplicativeLR(o, Rising(6)),
    },
    "StepLR": {"default": lambda o: lr.StepLR(o, 2)},
    "MultiStepLR": {"milestones, one twice": lambda o: lr.MultiStepLR(o, [2, 4, 4, 7])},
    "ConstantLR": {"default": lambda o: lr.ConstantLR(o, 0.5, 4)},
    "LinearLR": {"default": lambda o: lr.LinearLR(o, 0.1, total_iters=9)},
    "ExponentialLR": {"default": lambda o: lr.ExponentialLR(o, 0.9)},
    "PolynomialLR": {"power 2": lambda o: lr.PolynomialLR(o, 8, power=2.0)},
    "CosineAnnealingLR": {"eta_min": lambda o: lr.CosineAnnealingLR(o, 10, eta_min=0.01)},
    "CosineAnnealingWarmRestarts": {
        "T_mult 2": lambda o: lr.CosineAnnealingWarmRestarts(o, 3, 2)
    },
    "CyclicLR": {
        **{
            mode: partial(lr.CyclicLR, base_lr=0.1, max_lr=0.5, step_size_up=4, mode=mode)
            for mode in ("triangular", "triangular2", "exp_range")
        },
        "scale_fn": lambda o: lr.CyclicLR(o, 0.1, 0.5, 4, scale_fn=lambda n: 0.5**n),
        "scale_fn, object": lambda o: lr.CyclicLR(o, 0.1, 0.5, 4, scale_fn=Rising(3)),
    },
    "OneCycleLR": {
        "cosine": lambda o: lr.OneCycleLR(o, 0.5, 20),
        "linear, three phases": lambda o: lr.OneCycleLR(
            o, [0.5, 0.4], 20, anneal_strategy="linear", three_phase=True
        ),
    },
    "ReduceLROnPlateau": {
        mode: partial(lr.ReduceLROnPlateau, mode=mode, patience=1, cooldown=1)
        for mode in ("min", "max")
    },
    "SequentialLR": {
        "two": lambda o: lr.SequentialLR(
            o, [lr.ConstantLR(o, 0.1, 3), lr.MultiStepLR(o, [2, 4])], milestones=[4]
        ),
    },
    "ChainedScheduler": {
        "two": lambda o: lr.ChainedScheduler([lr.StepLR(o, 3), lr.ExponentialLR(o, 0.9)]),
        "of a sequence": lambda o: lr.ChainedScheduler(
            [
                lr.SequentialLR(o, [lr.StepLR(o, 1), lr.ConstantLR(o, 0.5, 9)], [2]),
                lr.ExponentialLR(o, 0.9),
            ]
        ),
    },
    "SWALR": {
        "linear": lambda o: SWALR(o, 0.05, anneal_epochs=5, anneal_strategy="linear"),
        "cosine, one for each group": lambda o: SWALR(o, [0.05, 0.02], anneal_epochs=5),
    },
}


class Scheduled:
    """A module, its optimizer of two groups, and a scheduler that sets their rates."""

    def __init__(self, make: Callable[[Any], Any], seed: int) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        groups = [{"params": part.parameters(), "lr": 0.4 / seed} for part in self.module]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of its own schedulers
            self.scheduler = make(self.optimizer)

    def state(self, name: str) -> LeafState:
        return TrainState(
            module=self.module,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            name=name,
        )

    def advance(self) -> Any:
        rates = []
        for step in range(STEPS):
            self.optimizer.zero_grad()
            self.module(torch.full((3, 2), 1.0 + step)).sum().backward()
            self.optimizer.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                plateau = isinstance(self.scheduler, lr.ReduceLROnPlateau)
                self.scheduler.step(*[2.0] * plateau)
            rates += [group["lr"] for group in self.optimizer.param_groups]
        return rates

    def contents(self) -> Any:
        return [
            self.module.state_dict(),
            self.optimizer.state_dict(),
            self.scheduler.state_dict(),
            self.scheduler.get_last_lr(),
        ]


def scheduler_cases() -> Iterator[Case]:
    for what, forms in CONFIGURATIONS.items():
        for form, make in forms.items():
            yield Case("Schedulers", what, form, partial(Scheduled, make))


def public_schedulers() -> set[str]:
    """Return the names of all that torch offers, but the base class."""
    there = {
        name
        for name, value in vars(lr).items()
        if isinstance(value, type) and not name.startswith("_")
        if issubclass(value, (lr.LRScheduler, lr.ReduceLROnPlateau))
    }
    return (there | {"SWALR"}) - {"LRScheduler"}
