# SPDX-License-Identifier: Apache-2.0
"""Every optimizer of torch, in every configuration that torch tests it in."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpi_ckpt import TrainState
from tests.conformance.subjects import Case
from tests.conformance.torch_db import OPTIMIZERS, configurations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpi_ckpt.state import LeafState

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "Muon": [(3, 4), (2, 3)],  # takes matrices only
    "": [(3, 4), (5,), (), (2, 1, 3)],
}


class Pulled:
    """Parameters that an optimizer pulls to a target; the gradients are made by hand.

    So a ``differentiable`` one can be asked for a step: it works on its parameters with
    gradients enabled, which torch refuses to leaves that require some.
    """

    def __init__(self, info: Any, index: int, seed: int) -> None:
        stream = torch.Generator().manual_seed(seed)
        given = configurations("cpu", torch.float32, info)[index].kwargs
        needs = not given.get("differentiable", False)
        shapes = SHAPES.get(info.name, SHAPES[""])
        self.module = nn.ParameterDict(
            {
                f"p{number}": nn.Parameter(torch.randn(shape, generator=stream), needs)
                for number, shape in enumerate(shapes)
            }
        )
        self._sparse = info.only_supports_sparse_grads
        self.optimizer = info.optim_cls(self.module.parameters(), **copy.deepcopy(given))

    def state(self, name: str) -> LeafState:
        return TrainState(module=self.module, optimizer=self.optimizer, name=name)

    def advance(self) -> Any:
        return self.optimizer.step(self._closure)

    def _closure(self) -> torch.Tensor:
        with torch.no_grad():
            loss = torch.zeros(())
            for parameter in self.module.parameters():
                loss += (parameter - 1).square().sum()
                gradient = 2 * (parameter - 1)
                sparse = self._sparse and gradient.dim()
                parameter.grad = gradient.to_sparse() if sparse else gradient
                if self._sparse and not sparse:
                    parameter.grad = None
        return loss

    def contents(self) -> Any:
        return [self.module.state_dict(), self.optimizer.state_dict()]


def optimizer_cases() -> Iterator[Case]:
    for info in OPTIMIZERS:
        for index, given in enumerate(configurations("cpu", torch.float32, info)):
            make = partial(Pulled, info, index)
            yield Case("Optimizers", info.optim_cls.__name__, given.desc, make)
