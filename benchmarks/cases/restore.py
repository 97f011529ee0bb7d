# SPDX-License-Identifier: Apache-2.0
"""A restore with a cold cache until every rank is ready to train."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, get_args

from benchmarks import ceilings, names
from benchmarks.harness import Contender, Group
from benchmarks.peers import load_contenders
from mpi_ckpt.options import IO, Ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.setting import Setting
    from mpi_ckpt import CheckpointManager, RestoreReport

__all__ = ["groups"]


def _restore(name: str, setting: Setting, manager: CheckpointManager) -> Contender:
    def values(report: RestoreReport) -> dict[str, float]:
        return {"bytes_read": report.bytes_read}

    return Contender(name, manager.restore, setting.cold, values=values)


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    manager = setting.manager("ours")
    path: Path = manager.save().wait().path

    def raw(name: str, read: Callable[[Path], None]) -> Contender:
        def read_all() -> None:
            for file in sorted(path.glob("*.safetensors")):
                read(file)

        return Contender(name, setting.on_root(read_all), setting.cold, ceiling=True)

    def direct(mebibytes: int, depth: int) -> Contender:
        read = partial(ceilings.read_direct, block_bytes=mebibytes << 20, depth=depth)
        return raw(names.RAW_READ, read)

    contenders = [
        setting.fastest(names.RAW_READ, direct),
        raw(names.RAW_BUFFERED_READ, ceilings.read_buffered),
        _restore(names.RESTORE, setting, manager),
    ]
    # With several readers: each from a directory of its own, which others may not share.
    for value in get_args(Ranks) if setting.comm.size > 1 else []:
        if value != "root":
            several = setting.manager(f"ours-{value}", io=IO(readers=value))
            several.save().wait()
            name = f"{names.RESTORE}, readers={value}"
            contenders.append(_restore(name, setting, several))
    contenders += load_contenders(setting)
    yield Group("cold cache", setting.nbytes, contenders)
