# SPDX-License-Identifier: Apache-2.0
"""Who writes: root alone, one rank a node, or all."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from benchmarks import names
from benchmarks.cases.save import our_save, raw_writes
from benchmarks.harness import Group
from mpi_ckpt.options import Ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.setting import Setting

__all__ = ["groups"]


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    contenders = raw_writes(setting)
    for value in get_args(Ranks):
        manager = setting.manager(f"ours-{value}", writers=value)
        contenders.append(our_save(f"{names.SAVE}, writers={value}", setting, manager))
    yield Group("durable", setting.nbytes, contenders)
