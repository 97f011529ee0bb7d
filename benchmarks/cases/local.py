# SPDX-License-Identifier: Apache-2.0
"""Saves on the hosts beside saves to the directory: how long each stops the training.

``scripts/virtual_hosts run -n 3 python -m benchmarks local``: on one host all bytes lie
once, on it. Each host keeps its share below the directory, which may be one for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import ceilings, names
from benchmarks.cases.save import raw_writes
from benchmarks.harness import Contender, Group
from mpi_ckpt import Local

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.setting import Setting
    from mpi_ckpt import CheckpointManager, PendingSave, SaveReport

__all__ = ["groups"]


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    place = str(setting.directory / "hosts" / "{host}")
    local = Local(place, reserve=0, keep=1)
    behind = setting.manager("behind", asynchronous=True)
    hosts = setting.manager("hosts-behind", asynchronous=True, local=local)
    copy = ceilings.WarmCopy(setting.state.values()) if setting.is_root else None
    memcpy = setting.on_root(lambda: copy and copy())
    stalls = [
        Contender(names.MEMCPY, memcpy, ceiling=True, durable=False),
        _stall(names.STALL_SYNC, setting, behind, {}),
        _stall(names.STALL_LOCAL, setting, hosts, {"level": "local"}),
    ]
    yield Group("until save() returns", setting.nbytes, stalls)
    blocking = setting.manager("blocking")
    other = Local(f"{place}-blocking", reserve=0, keep=1)
    kept = setting.manager("hosts-blocking", local=other)
    yield Group(
        "until it is durable, or kept",
        setting.nbytes,
        [
            *raw_writes(setting),
            Contender(names.SAVE, blocking.save, setting.touch),
            Contender(
                names.SAVE_LOCAL,
                lambda: kept.save(level="local"),
                setting.touch,
                values=lambda report: _shares(setting, report),
            ),
        ],
    )


def _stall(
    name: str, setting: Setting, manager: CheckpointManager, given: Mapping[str, Any]
) -> Contender:
    def finish(pending: SaveReport | PendingSave) -> None:
        pending.wait()
        manager.wait()

    return Contender(
        name, lambda: manager.save(**given), setting.touch, finish, durable=False
    )


def _shares(setting: Setting, report: SaveReport) -> Mapping[str, float]:
    """Return how much all hosts have written, in copies of the state."""
    assert report.generation
    return {"copies": report.bytes_written / setting.nbytes}
