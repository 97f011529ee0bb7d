# SPDX-License-Identifier: Apache-2.0
"""Every module of torch, in every configuration that torch tests it in."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from mpi_ckpt import ModuleState
from tests.conformance.subjects import Case
from tests.conformance.torch_db import MODULES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpi_ckpt.state import LeafState


@contextmanager
def torchs_advice_unheard() -> Iterator[None]:
    """Make and call a module without what torch says of how it could be faster."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@cache
def inputs(index: int, seed: int) -> list[Any]:
    """Return what a module is made with and given; other tensors for another seed."""
    info = MODULES[index]
    torch.manual_seed(seed)
    # Those of fractional pooling are partly of double precision, whatever is asked for.
    mixed = info.module_cls.__name__.startswith("Fractional")
    dtype = torch.float64 if mixed else torch.float32
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )


class Forwarded:
    """A module in training mode, whose step is a forward."""

    def __init__(self, index: int, number: int, seed: int) -> None:
        given = inputs(index, seed)[number].constructor_input
        self._forward = inputs(index, 0)[number].forward_input
        torch.manual_seed(seed)
        with torchs_advice_unheard():
            self.module = MODULES[index].module_cls(*given.args, **given.kwargs)

    def state(self, name: str) -> LeafState:
        return ModuleState(name, self.module)

    def advance(self) -> Any:
        torch.manual_seed(0)
        with torch.no_grad(), torchs_advice_unheard():
            return self.module(*self._forward.args, **self._forward.kwargs)

    def contents(self) -> Any:
        return {
            name: "no shape yet" if is_lazy(value) else value
            for name, value in self.module.state_dict().items()
        }

    def entries(self) -> list[str]:
        """Return what tells its state from that of another configuration."""
        return [
            f"{name} {'' if is_lazy(value) else list(value.shape)}"
            for name, value in self.module.state_dict().items()
        ]


def module_cases() -> Iterator[Case]:
    for index, info in enumerate(MODULES):
        for number, given in enumerate(inputs(index, 0)):
            form = given.desc or f"configuration {number}"
            make = partial(Forwarded, index, number)
            yield Case("Modules", info.module_cls.__name__, form, make)
