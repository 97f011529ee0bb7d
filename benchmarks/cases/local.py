# SPDX-License-Identifier: Apache-2.0
"""Saves on the hosts beside saves to the directory, and a restore after a host was lost.

``scripts/virtual_hosts run -n 3 python -m benchmarks local``: on one host all bytes lie
once, on it. Each host keeps its share below the directory, which may be one for all.
"""

from __future__ import annotations

import shutil
import socket
from typing import TYPE_CHECKING, Any

from benchmarks import ceilings, names
from benchmarks.cases.save import raw_writes
from benchmarks.cases.sync import one_hop
from benchmarks.harness import Contender, Group
from mpi_ckpt import Local

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.setting import Setting
    from mpi_ckpt import CheckpointManager, PendingSave, RestoreReport, SaveReport

__all__ = ["groups"]

_COPIES = 2


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    place = str(setting.directory / "hosts" / "{host}")
    names_of_hosts = setting.comm.allgather(socket.gethostname())
    share = min(1.0, _COPIES / len(set(names_of_hosts)))
    yield Group("until save() returns", setting.nbytes, _stalls(setting, place, share))
    blocking = setting.manager("blocking")
    other = Local(f"{place}-blocking", reserve=0, keep=1, copies=_COPIES)
    kept = setting.manager("hosts-blocking", local=other)
    yield Group(
        "until it is durable, or kept",
        setting.nbytes,
        [
            *raw_writes(setting),
            _plain_copies(setting, share),
            Contender(names.SAVE, blocking.save, setting.touch),
            Contender(
                names.SAVE_LOCAL,
                lambda: kept.save(level="local"),
                setting.touch,
                lambda _: kept.wait(),
                values=lambda report: _shares(setting, report),
            ),
        ],
    )
    if len(set(names_of_hosts)) > 1:
        lost = f"{place}-lost"
        restores = [
            *one_hop(setting),
            _restore(setting, lost, is_lost=names_of_hosts[-1] == socket.gethostname()),
        ]
        yield Group("after a host was lost, cold cache", setting.nbytes, restores)


def _stalls(setting: Setting, place: str, share: float) -> list[Contender]:
    local = Local(place, reserve=0, keep=1, copies=_COPIES)
    behind = setting.manager("behind", asynchronous=True)
    hosts = setting.manager("hosts-behind", asynchronous=True, local=local)
    arrays = setting.state.values()
    copy = ceilings.WarmCopy(arrays) if setting.is_root else None
    memcpy = setting.on_root(lambda: copy and copy())
    digested = ceilings.DigestedCopy(arrays, share)

    setting.comm.Barrier()  # else the machine is not idle when that is looked at

    def work() -> None:
        digested()
        setting.comm.Barrier()

    return [
        Contender(names.MEMCPY, memcpy, ceiling=True, durable=False),
        Contender(names.RAW_LOCAL_COPY, work, ceiling=True, durable=False),
        _stall(names.STALL_SYNC, setting, behind, {}),
        _stall(names.STALL_LOCAL, setting, hosts, {"level": "local"}),
    ]


def _plain_copies(setting: Setting, share: float) -> Contender:
    """Each rank writes its share to a new file: as the first of each host does."""
    path = setting.directory / f"plain-{setting.comm.rank}"
    arrays = [
        array.reshape(-1)[: int(share * array.size)] for array in setting.state.values()
    ]

    def clear(_: object = None) -> None:
        path.unlink(missing_ok=True)
        setting.comm.Barrier()

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)  # a host may have none of its own
        ceilings.write_buffered(path, arrays)
        setting.comm.Barrier()

    return Contender(names.RAW_LOCAL_WRITE, write, clear, clear, ceiling=True)


def _restore(setting: Setting, place: str, *, is_lost: bool) -> Contender:
    """One host, the last, comes back empty; its ranks get all bytes from the others."""
    local = Local(place, reserve=0, keep=1, copies=_COPIES)
    with setting.manager("hosts-lost", local=local) as saving:
        saving.save(level="local")
    opened: list[CheckpointManager] = []

    def lose() -> None:
        if is_lost:
            shutil.rmtree(place.format(host=socket.gethostname()), ignore_errors=True)
        setting.comm.Barrier()
        setting.cold()
        opened.append(setting.manager("hosts-lost", is_fresh=False, local=local))

    def check(report: RestoreReport) -> None:
        opened.pop().close()
        assert report.level == "local"

    return Contender(names.RESTORE_LOCAL, lambda: opened[-1].restore(), lose, check)


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
