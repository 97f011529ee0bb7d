# SPDX-License-Identifier: Apache-2.0
"""Arrays that are cut over the ranks in 2-D blocks: saved, and restored into any blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from benchmarks import ceilings, names
from benchmarks.cases.memory import watched
from benchmarks.cut import CutArrays, whole_side
from benchmarks.harness import Contender, Group
from benchmarks.peers.cut import available_cut
from benchmarks.setting import sleep_until_all_come
from mpi_ckpt.comm import exchange_messages
from mpi_ckpt.engine.restore.cut import trading
from mpi_ckpt.options import IO

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mpi4py import MPI

    from benchmarks.peers.cut import CutPeer
    from benchmarks.setting import Setting
    from mpi_ckpt import CheckpointManager, RestoreReport
    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.comm.collectives import Message

__all__ = ["groups"]


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    grid = _make(setting, _blocks(setting.comm.size))
    yield Group("save", grid.nbytes, _saves(setting, grid))
    with _Sent() as sent:
        yield Group("restore, same boxes", grid.nbytes, _same_boxes(setting, grid, sent))
        others = _other_boxes(setting, sent)
        yield Group("restore, other boxes", grid.nbytes, others)
        yield Group("peak", grid.nbytes, _peaks(setting, grid, sent))


def _blocks(size: int) -> tuple[int, int]:
    from mpi4py import MPI

    down, across = MPI.Compute_dims(size, 2)
    return down, across


def _make(setting: Setting, dims: tuple[int, int]) -> CutArrays:
    side = whole_side(setting.nbytes, setting.comm.size)
    return CutArrays.make(setting.comm.rank, dims, side)


# --- saves ---------------------------------------------------------------------------


def _saves(setting: Setting, cut: CutArrays) -> list[Contender]:
    manager = setting.manager("ours", [cut.state()])
    return [_raw_write(setting, cut), _our_save(manager, cut), *_peer_saves(setting, cut)]


def _our_save(manager: CheckpointManager, cut: CutArrays) -> Contender:
    def change() -> None:
        for array in cut.arrays.values():
            array[0, 0] += 1  # no tile is as it was

    return Contender(
        names.SAVE_CUT,
        manager.save,
        change,
        after=lambda _: manager.wait(),
        values=lambda report: {
            "bytes_written": report.bytes_written,
            **{f"{phase}_seconds": spent for phase, spent in report.seconds.items()},
        },
    )


def _raw_write(setting: Setting, cut: CutArrays) -> Contender:
    own = setting.directory / f"raw-{setting.comm.rank}"
    nbytes = sum(array.nbytes for array in cut.arrays.values())

    def clear(_: object = None) -> None:
        own.unlink(missing_ok=True)

    def contender(mebibytes: int, depth: int) -> Contender:
        write = partial(
            ceilings.write_direct, own, nbytes, block_bytes=mebibytes << 20, depth=depth
        )
        return Contender(names.RAW_OWN_WRITE, write, clear, clear)

    return setting.fastest(names.RAW_OWN_WRITE, contender)


def _peer_saves(setting: Setting, cut: CutArrays) -> list[Contender]:
    return [
        Contender(
            peer.save_name,
            partial(peer.save_durably, cut),
            peer.clear,
            # What it has written is not to be written back while another one is timed.
            partial(_clear, peer),
        )
        for peer in available_cut(setting, "save")
    ]


# --- restores ------------------------------------------------------------------------


def _same_boxes(setting: Setting, cut: CutArrays, sent: _Sent) -> list[Contender]:
    path = _save(setting, "same", cut)
    ours = _our_restore(names.RESTORE_SAME, setting, "same", cut, sent)
    loads = _peer_loads(setting, "same", cut, cut)
    return [_raw_read(setting, path), ours, *loads]


def _other_boxes(setting: Setting, sent: _Sent) -> list[Contender]:
    """Return restores of rows into columns: each rank has some of what each other wants."""
    comm = setting.comm
    rows, columns = _make(setting, (comm.size, 1)), _make(setting, (1, comm.size))
    path = _save(setting, "other", rows)
    contenders = [
        _raw_read(setting, path),
        _our_restore(names.RESTORE_OTHER, setting, "other", columns, sent),
        _our_restore(
            names.RESTORE_ONE_READER, setting, "other", columns, sent, io=IO(readers="node")
        ),
        *_peer_loads(setting, "other", rows, columns),
    ]
    if comm.size > 1:
        contenders.append(_restore_on_half(setting, sent))
    return contenders


def _restore_on_half(setting: Setting, sent: _Sent) -> Contender:
    """Return the restore on half of the ranks; the others sleep."""
    comm = setting.comm
    ranks = comm.size // 2
    part = comm.Split(int(comm.rank >= ranks), comm.rank)
    setting.stack.callback(part.Free)
    name, side = names.RESTORE_FEWER, whole_side(setting.nbytes, comm.size)
    cut = CutArrays(side, (1, ranks), (0, 0), (0, 0), {})
    if comm.rank < ranks:
        cut = CutArrays.make(comm.rank, (1, ranks), side)
    return _our_restore(name, setting, "other", cut, sent, half=cast("MPI.Intracomm", part))


def _save(setting: Setting, title: str, cut: CutArrays) -> Path:
    cut.fill()
    manager = setting.manager(title, [cut.state()])
    path: Path = manager.save().wait().path
    # Its directory has to be free for the managers of the restores.
    manager.close()
    return path


def _our_restore(
    name: str,
    setting: Setting,
    title: str,
    cut: CutArrays,
    sent: _Sent,
    *,
    half: MPI.Intracomm | None = None,
    io: IO | None = None,
) -> Contender:
    """Return a restore by a new manager, as at the start of a program.

    Args:
        name: Of the contender.
        setting: All ranks.
        title: Of the directory.
        cut: The boxes to fill.
        sent: Counts what is sent.
        half: Half of the ranks, this rank's half; the half with boxes restores. None if all
            restore.
        io: How bytes move; None: as by default.
    """
    here = setting if half is None else replace(setting, comm=half)
    managers: list[CheckpointManager] = []

    def before() -> None:
        cut.clear()
        sent.clear()
        if cut.arrays:
            ways = io or IO()
            manager = here.manager(title, [cut.state()], is_fresh=False, io=ways)
            managers.append(manager)
        setting.cold()

    def run() -> RestoreReport | None:
        report = managers[-1].restore() if managers else None
        if half is not None:
            sleep_until_all_come(setting.comm)
        return report

    def values(report: RestoreReport | None) -> dict[str, float]:
        total = setting.comm.allreduce(sent.nbytes)
        if report is None:
            return {}
        return {"bytes_read": report.bytes_read, "bytes_sent": total}

    def after(_: object) -> None:
        if managers:
            managers.pop().close()
        cut.check(setting.comm, name)

    return Contender(name, run, before, after, values)


def _raw_read(setting: Setting, path: Path) -> Contender:
    files = sorted(path.glob("tiles-*"))[setting.comm.rank :: setting.comm.size]

    def contender(mebibytes: int, depth: int) -> Contender:
        def read() -> None:
            for file in files:
                ceilings.read_direct(file, block_bytes=mebibytes << 20, depth=depth)

        return Contender(names.RAW_OWN_READ, read, setting.cold)

    return setting.fastest(names.RAW_OWN_READ, contender)


def _peer_loads(
    setting: Setting, title: str, saved: CutArrays, wanted: CutArrays
) -> list[Contender]:
    contenders = []
    for peer in available_cut(setting, title, load=True):
        peer.clear()
        saved.fill()
        peer.save_durably(saved)

        def before() -> None:
            wanted.clear()
            setting.cold()

        contenders.append(
            Contender(
                names.load(peer.name),
                partial(peer.load, wanted),
                before,
                partial(_check, setting, wanted, peer.name),
            )
        )
    return contenders


def _clear(peer: CutPeer, _: object) -> None:
    peer.clear()


def _check(setting: Setting, cut: CutArrays, who: str, _: object) -> None:
    cut.check(setting.comm, who)


# --- memory --------------------------------------------------------------------------


def _peaks(setting: Setting, cut: CutArrays, sent: _Sent) -> list[Contender]:
    """Return saves and restores whose memory is watched: the timed ones are not."""
    columns = _make(setting, (1, setting.comm.size))
    contenders = [
        Contender(names.ONE_COPY, lambda: _copy(cut), ceiling=True),
        _our_save(setting.manager("peak", [cut.state()]), cut),
        _our_restore(names.RESTORE_SAME, setting, "same", cut, sent),
        _our_restore(names.RESTORE_OTHER, setting, "other", columns, sent),
        *_peer_saves(setting, cut),
        *_peer_loads(setting, "peak", cut, columns),
    ]
    return [watched(setting, contender) for contender in contenders]


def _copy(cut: CutArrays) -> None:
    kept = [array.copy() for array in cut.arrays.values()]
    del kept


# --- counting ------------------------------------------------------------------------


class _Sent:
    """Counts the bytes of tiles that this rank sends to others, within a block."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __enter__(self) -> _Sent:
        vars(trading)["exchange_messages"] = self._exchange
        return self

    def __exit__(self, *_: object) -> None:
        vars(trading)["exchange_messages"] = exchange_messages

    def clear(self) -> None:
        """Begin to count anew."""
        self.nbytes = 0

    def _exchange(
        self,
        comm: Communicator,
        sends: Sequence[Message],
        receives: Sequence[Message],
        doing: str,
    ) -> None:
        self.nbytes += sum(len(message) for _, message in sends)
        exchange_messages(comm, sends, receives, doing)
