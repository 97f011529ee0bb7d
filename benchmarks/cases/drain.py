# SPDX-License-Identifier: Apache-2.0
"""Steps of a training while the hosts copy a generation to the directory, at half the disk.

As many steps as one such copy takes, at a rate of half of what a raw direct write reaches.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks import ceilings, names
from benchmarks.cases.train import Training
from benchmarks.harness import Contender, Group
from mpi_ckpt import Local, TrainState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.setting import Setting
    from mpi_ckpt import CheckpointManager

__all__ = ["groups"]

_TURNS = 3


class CopiedBehind:
    """A training of which one copy is under way during some steps.

    Args:
        training: The training.
        manager: Saves to the hosts at each step whose number is a multiple of ``cycle``.
        cycle: One more than the number of timed steps.
    """

    def __init__(self, training: Training, manager: CheckpointManager, cycle: int) -> None:
        self._training = training
        self._manager = manager
        self._cycle = cycle

    def begin(self) -> None:
        """Step up to a due save, and let the copy of it begin."""
        while self._manager.steps % self._cycle != self._cycle - 1:
            self._manager.step()
        self._manager.step()

    def run(self) -> None:
        """Take the timed steps."""
        for _ in range(self._cycle - 1):
            self._training.step()
            self._manager.step()

    def finish(self, _: object) -> None:
        """Wait for the copy."""
        self._manager.wait()

    def values(self, _: object) -> Mapping[str, float]:
        """Return whether the copy has lasted as long as the steps."""
        hosts = self._manager._session.hosts  # noqa: SLF001 (no other way to see it)
        is_busy = hosts is not None and hosts.drain is not None and hosts.drain.is_busy
        return {"copy_lasted": float(is_busy)}


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    training = Training(setting)
    rate = _disk_rate(setting, training.nbytes) / 2
    steps = 2
    if not setting.arguments.smoke:
        start = time.perf_counter()
        for _ in range(_TURNS):
            training.step()
        seconds = setting.comm.bcast((time.perf_counter() - start) / _TURNS)
        # Not quite as long as the copy takes: it is to last for all of them.
        steps = max(2, int(0.9 * training.nbytes / rate / seconds))
    state = TrainState(module=training.module, optimizer=training.optimizer)
    place = str(setting.directory / "hosts" / "{host}")
    local = Local(place, reserve=0, keep=1, drain=rate)
    manager = setting.manager("copied", [state], local=local, interval=steps + 1)
    plain = setting.manager("plain", [state])

    def run_without() -> None:
        for _ in range(steps):
            training.step()
            plain.step()

    copied = CopiedBehind(training, manager, steps + 1)
    contenders = [
        Contender(names.NO_SAVES, run_without, ceiling=True),
        Contender(
            names.STEPS_COPIED,
            copied.run,
            copied.begin,
            copied.finish,
            copied.values,
            durable=False,
        ),
    ]
    yield Group(f"{steps} steps, {rate / 1e6:.0f} MB/s", training.nbytes, contenders)


def _disk_rate(setting: Setting, nbytes: int) -> float:
    """Return bytes per second of the fastest of some raw direct writes by root."""
    path, best = setting.directory / "raw", 0.0
    if setting.is_root:
        for _ in range(_TURNS):
            start = time.perf_counter()
            ceilings.write_direct(path, nbytes, depth=4)
            best = max(best, nbytes / (time.perf_counter() - start))
        path.unlink()
    rate: float = setting.comm.bcast(best)
    return rate
