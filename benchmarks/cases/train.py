# SPDX-License-Identifier: Apache-2.0
"""Training from end to end: a save every 10 steps, a copy at each step, and neither."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks import names
from benchmarks.harness import Contender, Group
from mpi_ckpt import TrainState
from mpi_ckpt.elastic import Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from benchmarks.setting import Setting

__all__ = ["groups"]

_WIDTH = 1024
_SMOKE_WIDTH = 16
_BATCH = 64
_INTERVAL = 10


class Training:
    """A data-parallel training of a plain network with Adam, gradients averaged by MPI."""

    def __init__(self, setting: Setting) -> None:
        import torch

        arguments = setting.arguments
        self._comm = setting.comm
        self.steps = arguments.steps
        width = _SMOKE_WIDTH if arguments.smoke else _WIDTH
        depth = max(1, round(arguments.parameters / width**2))
        torch.manual_seed(0)
        layers = [m for _ in range(depth) for m in (torch.nn.Linear(width, width), _relu())]
        self.module = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-4)
        torch.manual_seed(setting.comm.rank)
        self._batch = torch.randn(_BATCH, width)
        self.step()  # makes the optimizer's moments

    @property
    def nbytes(self) -> int:
        """Bytes of parameters and moments."""
        return 3 * sum(p.numel() * p.element_size() for p in self.module.parameters())

    def step(self) -> None:
        """Take one step."""
        from mpi4py import MPI

        self.optimizer.zero_grad()
        loss = (self.module(self._batch) - self._batch).square().mean()
        loss.backward()
        for parameter in self.module.parameters():
            gradient = parameter.grad
            assert gradient is not None
            self._comm.Allreduce(MPI.IN_PLACE, gradient.numpy())
            gradient /= self._comm.size
        self.optimizer.step()

    def run(self, manager: Saver) -> None:
        """Take all steps with a save in the middle of each interval, and end the last.

        In the middle: the last save too has steps to hide behind, as in a long training.
        """
        for step in range(self.steps):
            self.step()
            manager.step()
            if step % _INTERVAL == _INTERVAL // 2:
                manager.save()
        manager.wait()


class Saver(Protocol):
    """What the training loop calls of a manager, or of what stands in for one."""

    def step(self) -> object:
        """Called after every step."""

    def save(self) -> object:
        """Called where a save is due."""

    def wait(self) -> object:
        """Called after the last step."""


class NoSaves:
    """Saves nothing."""

    def step(self) -> None:
        """See `Saver`."""

    def save(self) -> None:
        """See `Saver`."""

    def wait(self) -> None:
        """See `Saver`."""


class Copies(NoSaves):
    """Lets the manager copy the states into its memory at each step; saves nothing."""

    def __init__(self, manager: Saver) -> None:
        self._manager = manager

    def step(self) -> None:
        """See `Saver`."""
        self._manager.step()


class TorchSaves(NoSaves):
    """Root's torch.save made durable, the others waiting, as most training scripts do."""

    def __init__(self, setting: Setting, training: Training) -> None:
        self._training = training
        self._path = setting.directory / "torch.pt"
        self._write_on_root = setting.on_root(self._write)

    def save(self) -> None:
        """See `Saver`."""
        self._write_on_root()

    def _write(self) -> None:
        import torch

        everything = {
            "module": self._training.module.state_dict(),
            "optimizer": self._training.optimizer.state_dict(),
        }
        with self._path.open("wb") as file:
            torch.save(everything, file)
            file.flush()
            os.fsync(file.fileno())


def _relu() -> torch.nn.Module:
    import torch

    return torch.nn.ReLU()


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    training = Training(setting)
    ways: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (names.SAVE_ASYNC, {"asynchronous": True}, {}),
        (f"{names.SAVE_ASYNC}, overlapped", {"asynchronous": True}, {"overlap": True}),
        (names.SAVE, {}, {}),
    ]
    savers: dict[str, Saver] = {names.NO_SAVES: NoSaves()}
    for name, options, given in ways:
        parts: dict[str, Any] = {
            "module": training.module,
            "optimizer": training.optimizer,
            **given,
        }
        directory = f"ours-{len(savers)}"
        savers[name] = setting.manager(directory, [TrainState(**parts)], **options)
    memories = {
        names.COPIES: Memory("all", every=1),
        names.COPIES_ON_ROOT: Memory("root", every=1),
    }
    for name, memory in memories.items():
        state = TrainState(module=training.module, optimizer=training.optimizer)
        directory = f"ours-{len(savers)}"
        savers[name] = Copies(setting.manager(directory, [state], memory=memory))
    savers[names.durable(names.TORCH)] = TorchSaves(setting, training)
    contenders = [
        Contender(name, partial(training.run, saver), ceiling=name == names.NO_SAVES)
        for name, saver in savers.items()
    ]
    yield Group(f"{training.steps} steps", training.nbytes, contenders)
