# SPDX-License-Identifier: Apache-2.0
"""The cases: what is compared with what, on which bytes. One module each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.cases import (
    distributed,
    drain,
    horovod,
    local,
    memory,
    observing,
    plan,
    restore,
    reuse,
    save,
    serialization,
    small,
    stall,
    step,
    sync,
    train,
    writers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.harness import Group
    from benchmarks.setting import Setting

__all__ = ["CASES"]

CASES: dict[str, Callable[[Setting], Iterator[Group]]] = {
    "save": save.groups,
    "stall": stall.groups,
    "local": local.groups,
    "drain": drain.groups,
    "sync": sync.groups,
    "restore": restore.groups,
    "reuse": reuse.groups,
    "writers": writers.groups,
    "serialization": serialization.groups,
    "small": small.groups,
    "train": train.groups,
    "step": step.groups,
    "memory": memory.groups,
    "horovod": horovod.groups,
    "distributed": distributed.groups,
    "plan": plan.groups,
    "observing": observing.groups,
}
"""Name -> function that gives the groups of a case, one after the other is measured."""
