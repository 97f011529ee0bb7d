# SPDX-License-Identifier: Apache-2.0
"""Peak memory beyond what was there before: on root and on the other ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks import names
from benchmarks.harness import Contender, Group
from benchmarks.peak import PeakMemory
from benchmarks.peers import object_contenders, save_contenders
from mpi_ckpt import ArrayState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.setting import Arrays, Setting
    from mpi_ckpt import CheckpointManager

__all__ = ["groups", "watched"]

_OBJECT_BYTES = 64_000_000


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    copies = Contender(names.ONE_COPY, setting.on_root(lambda: _copy(setting.state)))
    contenders = [
        replace(copies, ceiling=True),
        *_ours(setting),
        *save_contenders(setting, both=False),
    ]
    yield Group(
        "peak", setting.nbytes, [watched(setting, contender) for contender in contenders]
    )
    yield _small_object(setting)


def _small_object(setting: Setting) -> Group:
    """Return the way of some peers to send a state, as one object: not with a large one.

    They take many times its size and a long time.
    """
    part: Arrays = {}
    for name, array in setting.state.items():
        if not part or sum(a.nbytes for a in part.values()) + array.nbytes <= _OBJECT_BYTES:
            part[name] = array
    manager = setting.manager("object", [ArrayState("part", part, sync="root")])
    contenders = [
        Contender(names.ONE_COPY, setting.on_root(lambda: _copy(part)), ceiling=True),
        Contender(names.SYNC, manager.sync, setting.differ),
        *object_contenders(setting, part),
    ]
    nbytes = sum(array.nbytes for array in part.values())
    return Group(
        "peak, sent", nbytes, [watched(setting, contender) for contender in contenders]
    )


def _ours(setting: Setting) -> list[Contender]:
    def contender(
        name: str, act: Callable[[CheckpointManager], object], *, asynchronous: bool = False
    ) -> Contender:
        # A manager of its own for each run: one that has saved keeps its memory.
        managers: list[CheckpointManager] = []

        def before() -> None:
            setting.touch()
            managers.append(setting.manager("ours", asynchronous=asynchronous))

        def after(_: object) -> None:
            managers.pop().close()

        return Contender(name, lambda: act(managers[-1]), before, after)

    saved = setting.manager("saved")
    saved.save()
    saved.wait()
    return [
        contender(names.SAVE, lambda manager: manager.save()),
        contender(
            names.SAVE_ASYNC, lambda manager: manager.save().wait(), asynchronous=True
        ),
        Contender(names.RESTORE, saved.restore, setting.cold),
    ]


def watched(setting: Setting, contender: Contender) -> Contender:
    """Return a contender with its highest peak of all runs, warm-up included.

    What a run leaves in the allocator's hands makes the next look cheaper. What else is
    noted of the contender is left out.
    """
    peak = PeakMemory()
    highest = {"peak_bytes_root": 0.0, "peak_bytes_others": 0.0}

    def before() -> None:
        contender.before()
        setting.comm.Barrier()
        peak.start()

    def values(_: object) -> dict[str, float]:
        root, *others = setting.comm.allgather(peak.stop())
        highest["peak_bytes_root"] = max(highest["peak_bytes_root"], root)
        highest["peak_bytes_others"] = max(highest["peak_bytes_others"], *others, 0)
        return dict(highest)

    return replace(contender, before=before, values=values)


def _copy(arrays: Arrays) -> None:
    kept = [array.copy() for array in arrays.values()]
    del kept
