# SPDX-License-Identifier: Apache-2.0
"""Who writes: root alone, one rank a node, or all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import names
from benchmarks.cases.save import our_save, raw_writes
from benchmarks.harness import Group
from benchmarks.setting import rank_choices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.setting import Setting

__all__ = ["groups"]


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    contenders = raw_writes(setting)
    for value in rank_choices("writers"):
        manager = setting.manager(f"ours-{value}", writers=value)
        contenders.append(our_save(f"{names.SAVE}, writers={value}", setting, manager))
    yield Group("durable", setting.nbytes, contenders)
