# SPDX-License-Identifier: Apache-2.0
"""What Horovod's users do: broadcasts at the start of a run, and commits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import ceilings, names
from benchmarks.harness import Contender, Group
from benchmarks.peers import find_horovod, object_contenders
from benchmarks.training import as_training
from mpi_ckpt import KeepLast, Options, TrainState
from mpi_ckpt.integrations import horovod as beside
from mpi_ckpt.integrations.horovod.elastic_state import commits_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from benchmarks.peers.horovod import Horovod
    from benchmarks.setting import Setting

__all__ = ["groups"]

_OBJECT_BYTES = 200_000_000
_OBJECT_ARRAYS = 50


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    for name, change in (("equal", setting.touch), ("all differ", setting.differ)):
        contenders = [_changed(change, contender) for contender in _training(setting)]
        yield Group(name, setting.nbytes, contenders)
        setting.touch()  # equal again
    yield _object(setting)
    yield _commits(setting)


def _changed(change: Callable[[], None], contender: Contender) -> Contender:
    def before() -> None:
        change()
        contender.before()

    return replace(contender, before=before)


def _training(setting: Setting) -> list[Contender]:
    module, optimizer = as_training(setting)
    comm, arrays = setting.comm, list(setting.state.values())
    manager = setting.manager("ours", [TrainState(module=module, optimizer=optimizer)])

    def ours() -> None:
        beside.broadcast_parameters(module.state_dict(), comm=comm)
        beside.broadcast_optimizer_state(optimizer, comm=comm)

    contenders = [
        Contender(names.IBCAST, lambda: ceilings.ibcast(comm, arrays), ceiling=True),
        Contender(names.SYNC, manager.sync),
        Contender(names.BROADCAST_TRAINING, ours),
    ]
    horovod = find_horovod(setting)
    if horovod is not None:

        def theirs() -> None:
            horovod.equalize_training(module, optimizer)

        contenders += _while_it_polls(
            horovod,
            Contender(names.beside_horovod(names.BROADCAST_TRAINING), ours),
            Contender(names.HOROVOD_TRAINING, theirs),
        )
    return contenders


def _while_it_polls(horovod: Horovod, *contenders: Contender) -> list[Contender]:
    """Have Horovod's thread run while these do, and not before or after."""
    return [
        replace(contender, before=horovod.begin, after=lambda _: horovod.end())
        for contender in contenders
    ]


def _object(setting: Setting) -> Group:
    from mpi4py.util import pkl5

    comm = setting.comm
    nbytes = 1_000_000 if setting.arguments.smoke else _OBJECT_BYTES
    each = nbytes // _OBJECT_ARRAYS // 4
    value = {
        f"array {number}": np.full(each, number + comm.rank, np.float32)
        for number in range(_OBJECT_ARRAYS)
    }
    arrays = list(value.values())

    def ours(*, in_place: bool = False) -> object:
        return beside.broadcast_object(value, comm=comm, in_place=in_place)

    plain = Contender(names.BROADCAST_OBJECT, ours)
    contenders = [
        Contender(names.IBCAST, lambda: ceilings.ibcast(comm, arrays), ceiling=True),
        plain,
        Contender(names.BROADCAST_OBJECT_IN_PLACE, lambda: ours(in_place=True)),
        Contender(names.PKL5, lambda: pkl5.Intracomm(comm).bcast(value)),
    ]
    horovod = find_horovod(setting)
    if horovod is not None:
        name = names.beside_horovod(names.BROADCAST_OBJECT)
        contenders += _while_it_polls(horovod, replace(plain, name=name))
    contenders += object_contenders(setting, value)
    return Group("object", sum(array.nbytes for array in arrays), contenders)


def _commits(setting: Setting) -> Group:
    module, optimizer = as_training(setting)
    # Root alone stages; the others wait for it.
    copy = ceilings.WarmCopy(setting.state.values()) if setting.is_root else None
    memcpy = setting.on_root(lambda: copy and copy())
    contenders = [Contender(names.MEMCPY, memcpy, ceiling=True, durable=False)]
    ways: dict[str, dict[str, Any]] = {
        names.COMMIT_DURABLE: {"interval": 1},
        names.COMMIT_ASYNC: {"interval": 1, "asynchronous": True},
        names.COMMIT_MEMORY: {"asynchronous": True},
    }
    for number, (name, options) in enumerate(ways.items()):
        chosen: dict[str, Any] = {"retention": KeepLast(1), "preemption_signals": ()}
        beside.configure(
            setting.directory / f"commits-{number}",
            options=Options(sync=False, **chosen, **options),
            comm=setting.comm,
        )
        state = beside.TorchState(module, optimizer)
        state.sync()
        setting.stack.callback(state.close)
        contenders.append(
            Contender(
                name,
                state.commit,
                setting.touch,
                partial(_wait, state),
                durable=name == names.COMMIT_DURABLE,
            )
        )
    beside.configure(None)
    horovod = find_horovod(setting)
    if horovod is not None:
        contenders.append(_horovods_commit(setting, horovod, module, optimizer))
    return Group("commit", setting.nbytes, contenders)


def _wait(state: Any, _: object) -> None:  # noqa: ANN401
    """Wait for what a commit has left to the background."""
    manager, _ = commits_of(state).meet("waiting for the last commit")
    manager.wait()


def _horovods_commit(
    setting: Setting,
    horovod: Horovod,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Contender:
    made: list[Any] = []

    def before() -> None:
        setting.touch()
        horovod.begin()
        made.append(horovod.elastic_state(module, optimizer))

    def after(_: object) -> None:
        made.clear()
        horovod.end()

    return Contender(
        names.HOROVOD_COMMIT, lambda: made[-1].commit(), before, after, durable=False
    )
