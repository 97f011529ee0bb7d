# SPDX-License-Identifier: Apache-2.0
"""What the checks work with: a model, a directory, the device, and the list of checks."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mpi_ckpt import CheckpointManager, Options
from mpi_ckpt.states.buffers.fingerprint import finish, row_sums
from mpi_ckpt.states.buffers.tensor_bytes import flat_bytes

if TYPE_CHECKING:
    from pathlib import Path


class NeedsDevice(Exception):
    """Raised by a check that says nothing about the host."""


@dataclass(frozen=True)
class Check:
    """A check: a function that raises AssertionError, or returns its figure as text."""

    name: str
    run: object


CHECKS: list[Check] = []


def check(function):
    """Add a function to the list, under its name."""
    CHECKS.append(Check(function.__name__, function))
    return function


@dataclass(frozen=True)
class Bench:
    """Where a check works.

    Attributes:
        comm: All ranks.
        directory: An empty directory, the same on each rank.
        device: Kind of the device: ``"cpu"`` for none.
        mebibytes: Size of the large tensors.
        figures: Takes numbers by name, for programs.
    """

    comm: object
    directory: Path
    device: str
    mebibytes: int
    figures: dict = field(default_factory=dict)

    @property
    def is_real(self):
        return self.device != "cpu"

    def need_device(self):
        if not self.is_real:
            raise NeedsDevice

    def synchronize(self):
        if self.is_real:
            torch.cuda.synchronize()

    def late(self):
        """Give the current stream 0.1 s of work."""
        if self.is_real:
            torch.cuda._sleep(200_000_000)

    def another_stream(self):
        """Make the work of a block that of another stream."""
        return torch.cuda.stream(torch.cuda.Stream()) if self.is_real else nullcontext()

    def manager(self, *states, **options):
        options = Options(preemption_signals=(), deadline_seconds=120.0, **options)
        return CheckpointManager(self.directory, states, comm=self.comm, options=options)

    def model(self, mebibytes=8, **options):
        """Return a linear layer with a norm, and AdamW after one step."""
        torch.manual_seed(0)
        width = int((mebibytes * 2**20 / 4) ** 0.5)
        layers = torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width)
        module = torch.nn.Sequential(*layers).to(self.device)
        optimizer = torch.optim.AdamW(module.parameters(), fused=self.is_real, **options)
        self.step(module, optimizer)
        return module, optimizer

    def step(self, module, optimizer):
        optimizer.zero_grad()
        inputs = torch.randn(16, module[0].in_features, device=self.device)
        module(inputs).square().mean().backward()
        optimizer.step()

    def large(self):
        return torch.randn(self.mebibytes * 2**18, device=self.device)


def values(module, optimizer):
    """Return copies of all tensors, in host memory."""
    moments = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    tensors = [*module.state_dict().values(), *moments]
    return [tensor.detach().cpu().clone() for tensor in tensors]


def fingerprint(tensor):
    """Make the fingerprint of a tensor where it is."""
    flat = flat_bytes(tensor.contiguous())
    return finish(row_sums([flat]).cpu().numpy(), len(flat))


def are_equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


def of_environment(comm, directory):
    """Make the bench that ``DEVICE`` and ``MIB`` ask for."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    device = os.environ.get("DEVICE", there)
    default = "2048" if device != "cpu" else "64"
    return Bench(comm, directory, device, int(os.environ.get("MIB", default)))
