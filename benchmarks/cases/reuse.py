# SPDX-License-Identifier: Apache-2.0
"""A second save when a hundredth of the bytes has changed since the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import names
from benchmarks.cases.save import our_save, raw_writes
from benchmarks.harness import Contender, Group
from benchmarks.setting import touch_arrays
from mpi_ckpt import IO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.setting import Arrays, Setting

__all__ = ["groups", "near_share"]

_SHARE = 0.01
# No repeat is to meet the full generation that is due every so often.
_NEVER = 1_000_000


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    full = our_save(names.REUSE_FULL, setting, setting.manager("full"))
    manager = setting.manager("part", io=IO(full_every=_NEVER))
    chosen = near_share(setting.state, _SHARE)
    changed = sum(setting.state[name].nbytes for name in chosen)
    turns = 0

    def change() -> None:
        # The contender before this one changed everything: save that, not timed.
        nonlocal turns
        turns += 1
        manager.save()
        manager.wait()
        touch_arrays([setting.state[name] for name in chosen], -turns)

    part = Contender(
        names.REUSE_PART,
        manager.save,
        change,
        after=lambda _: manager.wait(),
        values=lambda report: {
            "bytes_changed": changed,
            "bytes_written": report.bytes_written,
            "bytes_reused": report.bytes_reused,
        },
    )
    ceilings = raw_writes(setting)[:1]
    yield Group("second save", setting.nbytes, [*ceilings, full, part])


def near_share(state: Arrays, share: float) -> list[str]:
    """Return leaves, whole ones, that together have about that share of the bytes.

    From the largest down, each is taken if that brings the sum nearer.
    """
    wanted = share * sum(array.nbytes for array in state.values())
    chosen, taken = [], 0
    for name in sorted(state, key=lambda name: -state[name].nbytes):
        nbytes = state[name].nbytes
        if abs(taken + nbytes - wanted) < abs(taken - wanted):
            chosen.append(name)
            taken += nbytes
    return chosen
