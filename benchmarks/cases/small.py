# SPDX-License-Identifier: Apache-2.0
"""Many small leaves against one leaf of the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks import names
from benchmarks.harness import Contender, Group
from benchmarks.setting import touch_arrays
from mpi_ckpt import ArrayState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.setting import Arrays, Setting
    from mpi_ckpt import CheckpointManager

__all__ = ["groups"]

_LEAF_ELEMENTS = 1024


def _waiting(manager: CheckpointManager) -> Callable[[object], None]:
    return lambda _: manager.wait()


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    count = setting.arguments.leaves
    generator = np.random.default_rng(0)
    # One memory under both: what changes, changes for both.
    whole = generator.random(count * _LEAF_ELEMENTS, np.float32)
    rows = whole.reshape(count, _LEAF_ELEMENTS)
    many: Arrays = {f"leaf/{index:05d}": rows[index] for index in range(count)}
    states = {names.ONE_LEAF: {"all": whole}, names.MANY_LEAVES: many}
    managers = {
        name: setting.manager(f"ours-{len(arrays)}", [ArrayState("small", arrays)])
        for name, arrays in states.items()
    }
    turns = 0

    def change(*, alike: bool) -> None:
        nonlocal turns
        turns += 1
        value = turns if alike else turns * setting.comm.size + setting.comm.rank
        touch_arrays(rows, value)

    def group(
        name: str,
        act: Callable[[CheckpointManager], Callable[[], object]],
        before: Callable[[], object],
    ) -> Group:
        return Group(
            name,
            whole.nbytes,
            [
                Contender(
                    name,
                    act(manager),
                    before,
                    after=_waiting(manager),
                    ceiling=name == names.ONE_LEAF,
                )
                for name, manager in managers.items()
            ],
        )

    yield group("save", lambda manager: manager.save, lambda: change(alike=True))
    yield group("sync, equal", lambda manager: manager.sync, lambda: change(alike=True))
    yield group(
        "sync, all differ", lambda manager: manager.sync, lambda: change(alike=False)
    )
    change(alike=True)
    yield group("restore", lambda manager: manager.restore, setting.cold)
