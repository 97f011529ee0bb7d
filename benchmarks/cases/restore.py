# SPDX-License-Identifier: Apache-2.0
"""A restore with a cold cache until every rank is ready to train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import ceilings, names
from benchmarks.harness import Contender, Group
from benchmarks.peers import load_contenders
from benchmarks.setting import rank_choices

if TYPE_CHECKING:
    from collections.abc import Iterator
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

    def read() -> None:
        for file in sorted(path.glob("*.safetensors")):
            ceilings.read_direct(file)

    contenders = [
        Contender(names.RAW_READ, setting.on_root(read), setting.cold, ceiling=True),
        _restore(names.RESTORE, setting, manager),
    ]
    # With several readers: each from a directory of its own, which others may not share.
    for value in rank_choices("readers") if setting.comm.size > 1 else []:
        if value != "root":
            several = setting.manager(f"ours-{value}", readers=value)
            several.save().wait()
            name = f"{names.RESTORE}, readers={value}"
            contenders.append(_restore(name, setting, several))
    contenders += load_contenders(setting)
    yield Group("cold cache", setting.nbytes, contenders)
