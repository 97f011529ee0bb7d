# SPDX-License-Identifier: Apache-2.0
"""Checks the file system of a checkpoint directory by using it as a save does.

All trials use a separate directory, which is removed at the end.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import stat
import statistics
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.cli.doctor.checks import Check
from mpi_ckpt.cli.generations import lock_holder, look, newest_of
from mpi_ckpt.cli.plain_text import bytes_text
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_check = partial(Check, "directory")

_BLOCK_BYTES = 4096
_FSYNCS = 5
_SLOW_FSYNC_SECONDS = 0.1
_FEW_INODES = 1000
_MOUNTS_BYTES = 4 << 20

_NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "fuse")
_VOLATILE = ("tmpfs", "ramfs")


def check_directory(directory: Path) -> list[Check]:
    """Try in a directory every operation that saves need.

    Args:
        directory: The directory; if it does not exist, the first existing parent is used.
    """
    place = directory.absolute()
    while not place.is_dir():
        place = place.parent
    checks = [_name(directory, place), _file_system(place)]
    try:
        with _workshop(place) as shop:
            tried = (_direct, _links, _locks, _sync, _rename)
            checks += [_guarded(check, shop) for check in tried]
    except OSError as error:
        checks.append(
            _check(
                "writing", in_words(error), "wrong", "jobs cannot save here, only restore"
            )
        )
    checks += _space(directory, place)
    checks += _guard(directory)
    return checks


def mount_of(place: Path, table: str) -> tuple[str, str]:
    """Return type and options of a path's file system.

    Args:
        place: Absolute path without links.
        table: The text of ``/proc/self/mountinfo``.
    """
    best = ("", "unknown", "")
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        fields, others = before.split(), after.split()
        if len(fields) < 6 or len(others) < 1:
            continue
        point = fields[4].replace("\\040", " ")
        inside = point == "/" or f"{place}/".startswith(f"{point}/")
        if inside and len(point) >= len(best[0]):
            best = (point, others[0], ",".join([fields[5], *others[2:]]))
    return best[1], best[2]


def _name(directory: Path, place: Path) -> Check:
    if place == directory.absolute():
        return _check("directory", str(directory))
    return _check(
        "directory", f"{directory}: not made yet", "ok", f"{place} is examined instead"
    )


def _file_system(place: Path) -> Check:
    try:
        table = filesystem.read_start(Path("/proc/self/mountinfo"), _MOUNTS_BYTES)
    except OSError as error:
        return _check("file system", in_words(error), "note", "its kind is unknown")
    kind, options = mount_of(place.resolve(), table.decode(errors="replace"))
    given = options.split(",")
    if "nobarrier" in given or "barrier=0" in given:
        advice = "mounted without barriers: a power cut can take acknowledged saves"
        return _check("file system", kind, "wrong", advice)
    if kind in _VOLATILE:
        return _check("file system", kind, "note", "in memory: gone when the host restarts")
    if kind == "overlay":
        advice = "a container's own layer: gone with the container"
        return _check("file system", kind, "note", advice)
    if kind.startswith("nfs") and {"nolock", "local_lock=all", "local_lock=flock"} & {
        *given
    }:
        advice = "locks hold on this host only: a job on another would not be refused"
        return _check("file system", kind, "wrong", advice)
    if kind.startswith(_NETWORK):
        advice = "network: must be mounted with locks, and not async"
        return _check("file system", kind, "note", advice)
    return _check("file system", kind)


@contextmanager
def _workshop(place: Path) -> Iterator[Path]:
    # A name that no job would sweep, or count as a generation.
    shop = place / f".mpi-ckpt-doctor-{secrets.token_hex(6)}"
    filesystem.make_directory(shop)
    try:
        yield shop
    finally:
        filesystem.remove_tree(shop)


def _guarded(check: Callable[[Path], Check], shop: Path) -> Check:
    try:
        return check(shop)
    except OSError as error:
        name = check.__name__.strip("_")
        return _check(name, in_words(error), "wrong", "saves will fail here")


def _direct(shop: Path) -> Check:
    try:
        with (
            filesystem.create_file(shop / "direct", direct=True) as descriptor,
            mmap.mmap(-1, _BLOCK_BYTES) as block,
            memoryview(block) as view,
        ):
            filesystem.write_all(descriptor, view, 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        advice = "large files go through the page cache (IO.mode)"
        return _check("O_DIRECT", "no", "note", advice)
    return _check("O_DIRECT", "yes", "ok", "large files go around the page cache (IO.mode)")


def _links(shop: Path) -> Check:
    with filesystem.create_file(shop / "one"):
        pass
    try:
        filesystem.link_file(shop / "one", shop / "two")
    except OSError as error:
        advice = "unchanged leaves cannot be shared: each save writes all of them"
        return _check("hard links", in_words(error), "note", advice)
    return _check("hard links", "yes", "ok", "unchanged leaves are shared (IO.reuse)")


def _locks(shop: Path) -> Check:
    path = shop / "lock"
    try:
        with filesystem.create_file(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with (
                filesystem.open_for_reading(path) as (second, _),
                suppress(BlockingIOError),
            ):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                advice = "flock does not exclude: two jobs could write into one directory"
                return _check("flock", "of no effect", "wrong", advice)
    except OSError as error:
        advice = "jobs refuse to save here without Options(lock='lease'); or mount it with"
        return _check("flock", in_words(error), "wrong", f"{advice} locks")
    return _check("flock", "excludes", "ok", "a second job is refused")


def _sync(shop: Path) -> Check:
    times = []
    with filesystem.create_file(shop / "synced") as descriptor:
        for number in range(_FSYNCS):
            filesystem.write_all(descriptor, bytes(_BLOCK_BYTES), number * _BLOCK_BYTES)
            start = time.perf_counter()
            filesystem.sync_file(descriptor)
            filesystem.sync_directory(shop, if_possible=True)
            times.append(time.perf_counter() - start)
    try:
        filesystem.sync_directory(shop)
    except OSError as error:
        advice = "jobs refuse to save here without IO(sync_directories=False)"
        return _check("fsync", f"of directories: {in_words(error)}", "wrong", advice)
    taken = statistics.median(times)
    found = f"{1000 * taken:.2f} ms for a file and its directory"
    if taken > _SLOW_FSYNC_SECONDS:
        advice = "slow: with Options(asynchronous=True) the training does not wait for it"
        return _check("fsync", found, "note", advice)
    return _check("fsync", found, "ok", "a save waits for about three of these")


def _rename(shop: Path) -> Check:
    source, target = shop / "source", shop / "target"
    filesystem.make_directory(source)
    start = time.perf_counter()
    filesystem.rename_new(source, target)
    filesystem.sync_directory(shop, if_possible=True)
    taken = time.perf_counter() - start
    if source.is_dir() or not target.is_dir():
        return _check("rename", "of no effect", "wrong", "no save can be published here")
    return _check(
        "rename", f"{1000 * taken:.2f} ms, made durable", "ok", "publishes a save"
    )


def _space(directory: Path, place: Path) -> list[Check]:
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    total = status.f_blocks * status.f_frsize
    found = f"{bytes_text(free)} of {bytes_text(total)}"
    newest = _newest_bytes(directory)
    checks = []
    if not newest:
        checks.append(_check("free space", found))
    elif free < newest:
        advice = f"less than the newest generation takes ({bytes_text(newest)}): prune"
        checks.append(_check("free space", found, "wrong", advice))
    else:
        advice = f"room for {free // newest} more like the newest ({bytes_text(newest)})"
        checks.append(_check("free space", found, "ok", advice))
    if status.f_files and status.f_favail < _FEW_INODES:
        advice = "a generation takes a few files, and their names must fit"
        checks.append(_check("free inodes", str(status.f_favail), "wrong", advice))
    return checks


def _newest_bytes(directory: Path) -> int:
    try:
        newest = newest_of(look(directory))
    except CheckpointError:
        return 0
    return 0 if newest is None else newest.nbytes


def _guard(directory: Path) -> list[Check]:
    try:
        mode = directory.stat().st_mode
    except OSError:
        return []
    checks = []
    if mode & stat.S_IWOTH:
        advice = "any user who can write here can forge generations: chmod o-w"
        checks.append(_check("permissions", "anybody may write", "note", advice))
    holder = lock_holder(directory)
    if holder is not None:
        advice = "commands that change something are refused meanwhile"
        checks.append(_check("in use", holder, "ok", advice))
    return checks
