# SPDX-License-Identifier: Apache-2.0
"""A blocking save until it is durable, all ranks back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks import ceilings, names
from benchmarks.harness import Contender, Group
from benchmarks.peers import save_contenders

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.setting import Setting
    from mpi_ckpt import CheckpointManager

__all__ = ["groups", "our_save", "raw_writes"]


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    manager = setting.manager("ours")
    ours = our_save(names.SAVE, setting, manager)
    contenders = [*raw_writes(setting), ours, *save_contenders(setting)]
    yield Group("durable", setting.nbytes, contenders)


def raw_writes(setting: Setting) -> list[Contender]:
    """Return the ceilings: the same bytes written by root with nothing around."""
    raw = setting.directory / "raw"

    def clear(_: object = None) -> None:
        setting.on_root(lambda: raw.unlink(missing_ok=True))()

    def direct(mebibytes: int, depth: int) -> Contender:
        shape = {"block_bytes": mebibytes << 20, "depth": depth}
        write = partial(ceilings.write_direct, raw, setting.nbytes, **shape)
        return Contender(names.RAW_WRITE, setting.on_root(write), clear, clear)

    buffered = setting.on_root(lambda: ceilings.write_buffered(raw, setting.state.values()))
    return [
        setting.fastest(names.RAW_WRITE, direct),
        Contender(names.RAW_BUFFERED_WRITE, buffered, clear, clear, ceiling=True),
    ]


def our_save(name: str, setting: Setting, manager: CheckpointManager) -> Contender:
    """Return a save with every leaf changed: nothing is reused."""
    return Contender(
        name,
        manager.save,
        setting.touch,
        # Root's thread removes the generation before: it is not to disturb the next.
        after=lambda _: manager.wait(),
        values=lambda report: {
            "bytes_written": report.bytes_written,
            **{f"{phase}_seconds": spent for phase, spent in report.seconds.items()},
        },
    )
