# SPDX-License-Identifier: Apache-2.0
"""A commit of a model and its optimizer, as Horovod elastic's users make one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks import ceilings, names
from benchmarks.harness import Contender, Group
from benchmarks.peers import find_horovod
from benchmarks.training import as_training
from mpi_ckpt import KeepLast, Options
from mpi_ckpt.integrations.horovod import TorchState, configure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.setting import Setting

__all__ = ["groups"]

_KEEP = {"retention": KeepLast(1), "preemption_signals": (), "sync": False}
_TO_MEMORY = Options(**_KEEP)
_BEHIND = Options(**_KEEP, interval=1, asynchronous=True)
_AT_ONCE = Options(**_KEEP, interval=1)


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    copy = ceilings.WarmCopy(setting.state.values()) if setting.is_root else None
    memcpy = setting.on_root(lambda: copy and copy())
    ours = [
        _commit(setting, names.COMMIT, _TO_MEMORY),
        _commit(setting, names.COMMIT_BEHIND, _BEHIND),
    ]
    contenders = [
        Contender(names.MEMCPY, memcpy, ceiling=True, durable=False),
        *ours,
        _commit(setting, names.COMMIT_DURABLE, _AT_ONCE, durable=True),
        *_beside_horovod(setting, ours),
    ]
    yield Group("until commit() returns", setting.nbytes, contenders)


def _commit(
    setting: Setting, name: str, options: Options, *, durable: bool = False
) -> Contender:
    configure(
        setting.directory / name.rpartition(" ")[2], options=options, comm=setting.comm
    )
    module, optimizer = as_training(setting)
    state = setting.stack.enter_context(TorchState(module, optimizer, batch=0))
    state.sync()
    configure()

    def settle(_: object) -> None:
        # Waits for what is written behind.
        state.restore()

    return Contender(name, state.commit, setting.touch, settle, durable=durable)


def _beside_horovod(setting: Setting, ours: list[Contender]) -> list[Contender]:
    horovod = find_horovod(setting)
    if horovod is None:
        return []

    def begin() -> None:
        setting.touch()
        horovod.begin()

    def beside(one: Contender) -> Contender:
        def end(result: object) -> None:
            one.after(result)
            horovod.end()

        name = names.beside_horovod(one.name)
        return replace(one, name=name, before=begin, after=end)

    commit = horovod.make_commit(*as_training(setting))
    theirs = Contender(names.HOROVOD_COMMIT, commit, begin, durable=False)
    return [*map(beside, ours), replace(theirs, after=lambda _: horovod.end())]
