# SPDX-License-Identifier: Apache-2.0
"""The state of a case as a module and its optimizer, over the same memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.peers.base import as_tensors

if TYPE_CHECKING:
    import torch

    from benchmarks.setting import Setting

__all__ = ["as_training"]


def as_training(setting: Setting) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return the arrays of a setting as a module and its Adam."""
    import torch

    tensors = as_tensors(setting.state)
    parameters = {
        name.partition("/")[2]: torch.nn.Parameter(tensor)
        for name, tensor in tensors.items()
        if name.startswith("param/")
    }
    module = torch.nn.ParameterDict(parameters)
    optimizer = torch.optim.Adam(module.parameters())
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": tensors[f"exp_avg/{name}"],
            "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
        }
    return module, optimizer
