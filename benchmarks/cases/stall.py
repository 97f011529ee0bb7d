# SPDX-License-Identifier: Apache-2.0
"""How long training stops for an asynchronous save: until `save()` has returned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import ceilings, names
from benchmarks.harness import Contender, Group
from benchmarks.peers import start_contenders
from benchmarks.training import as_training
from mpi_ckpt import TrainState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.setting import Setting
    from mpi_ckpt import CheckpointManager, PendingSave, SaveReport

__all__ = ["groups"]


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    # Root alone stages; the others wait for it.
    copy = ceilings.WarmCopy(setting.state.values()) if setting.is_root else None
    memcpy = setting.on_root(lambda: copy and copy())
    contenders = [Contender(names.MEMCPY, memcpy, ceiling=True, durable=False)]
    for name, sync in ((names.STALL, False), (names.STALL_SYNC, True)):
        manager = setting.manager(f"ours-{sync}", asynchronous=True)
        contenders.append(_stall(name, setting, manager, sync=sync))
    states = [_train_state(setting)]
    manager = setting.manager("overlapped", states, asynchronous=True)
    contenders.append(_stall(names.STALL_OVERLAP, setting, manager, sync=False))
    contenders += start_contenders(setting)
    yield Group("until save() returns", setting.nbytes, contenders)


def _stall(
    name: str, setting: Setting, manager: CheckpointManager, *, sync: bool
) -> Contender:
    def finish(pending: SaveReport | PendingSave) -> None:
        pending.wait()
        manager.wait()

    def save() -> SaveReport | PendingSave:
        return manager.save(sync=sync)

    return Contender(name, save, setting.touch, finish, durable=False)


def _train_state(setting: Setting) -> TrainState:
    """Return the arrays as those of a module and its optimizer, in the same memory."""
    module, optimizer = as_training(setting)
    given: dict[str, Any] = {"module": module, "optimizer": optimizer, "overlap": True}
    return TrainState(**given)
