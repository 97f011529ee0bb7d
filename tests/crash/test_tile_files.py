# SPDX-License-Identifier: Apache-2.0
"""Power cuts while two files of tiles are written, each with its header last.

Two writers in one process stand for two ranks: what they do to files is the same.
"""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.crash.recorder import Op, Recorder, in_place_of_os
from tests.crash.replay import (
    Image,
    Model,
    crash_images,
    image_digest,
    read_image,
    write_image,
)
from tests.crash.world import empty, scratch
from tests.cutting import CutArray, bytes_of, write_cut
from tests.draws import JUDGED, SEED, STRESS, TIMES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mpi_ckpt.storage.writing.outfile import IOMode

SAMPLES = 100 if STRESS else 30 * TIMES


@pytest.fixture
def sandbox() -> Iterator[Path]:
    place = scratch()
    yield place
    shutil.rmtree(place)


def arrays_of(generation: int) -> dict[str, CutArray]:
    """Return 24 kB on each of two ranks: pieces to be torn, in header and data."""
    halves = [[Box((0, 0), (3, 1000))], [Box((3, 0), (3, 1000))]]
    field = np.full((6, 1000), float(generation)) + np.arange(1000)
    return {"field": CutArray(field, halves)}


def recorded(sandbox: Path, mode: IOMode) -> tuple[Image, list[Op]]:
    """Record the second generation on top of a durable first one."""
    root = sandbox / "ckpt"
    write_cut(root, arrays_of(1))
    base = read_image(sandbox)
    recorder = Recorder(sandbox)
    with in_place_of_os(recorder):
        write_cut(root, arrays_of(2), generation=2, mode=mode)
    recorder.mark(2)
    model = Model(base)
    for op in recorder.ops:
        model.apply(op)
    assert model.seen() == read_image(sandbox)
    return base, recorder.ops


def judge(root: Path, *, acknowledged: bool) -> str | None:
    """Return what is wrong with a disk after a crash."""
    for number in (1, 2):
        path = root / f"checkpoint-{number:08d}"
        if not path.exists():
            if number == 1 or acknowledged:
                return f"generation {number} is lost"
            continue
        try:
            with GenerationReader(path) as reader:
                verify(reader)
                for tile in reader.tiles()["fields", "field"]:
                    data = b"".join(
                        reader.read_block(tile.leaf, block)
                        for block in range(len(tile.leaf.digest.blocks))
                    )
                    if data != bytes_of(arrays_of(number)["field"].array, tile.box):
                        return f"generation {number} holds other bytes"
        except CheckpointError as error:
            return f"generation {number} is torn: {error}"
    return None


def faults_of(base: Image, ops: list[Op], name: str) -> tuple[list[str], int]:
    """Judge every distinct crash state; return the faults, and the number of states."""
    faults: list[str] = []
    seen: set[tuple[bytes, bool]] = set()
    place = scratch()
    try:
        rng = random.Random(f"{SEED} {name}")
        for done, choice, image in crash_images(base, ops, rng, samples=SAMPLES):
            acknowledged = any(op.kind == "mark" for op in ops[:done])
            key = (image_digest(image), acknowledged)
            if key in seen:
                continue
            seen.add(key)
            empty(place)
            write_image(image, place)
            fault = judge(place / "ckpt", acknowledged=acknowledged)
            faults += [f"after {done}, {choice}: {fault}"] if fault else []
    finally:
        shutil.rmtree(place)
    JUDGED.update(digest for digest, _ in seen)
    return faults, len(seen)


@pytest.mark.parametrize("mode", ["buffered", "direct"])
def test_every_crash_state_of_two_files_of_tiles_is_good(sandbox, mode):
    base, ops = recorded(sandbox, mode)
    for rank in range(2):
        writes = [
            op
            for op in ops
            if op.kind in ("pwrite", "sync_file") and f"tiles-0000{rank}" in op.path
        ]
        assert [op.kind for op in writes[-2:]] == ["pwrite", "sync_file"]
        assert writes[-2].offset == 0 < writes[-3].offset + len(writes[-3].data)
        assert [op.kind for op in writes].count("sync_file") == 1
    faults, states = faults_of(base, ops, mode)
    assert faults == []
    assert states >= 30


def test_header_written_after_the_fsync_would_be_found(sandbox, monkeypatch):
    headers: dict[int, bytes] = {}
    begun: set[int] = set()
    write, sync = filesystem.write_all, filesystem.sync_file

    def hold_header_back(descriptor, data, offset):
        if offset == 0 and descriptor in begun:
            headers[descriptor] = bytes(data)
            return
        begun.add(descriptor)
        write(descriptor, data, offset)

    def sync_first(descriptor):
        sync(descriptor)
        begun.discard(descriptor)
        if descriptor in headers:
            write(descriptor, headers.pop(descriptor), 0)

    monkeypatch.setattr(filesystem, "write_all", hold_header_back)
    monkeypatch.setattr(filesystem, "sync_file", sync_first)
    base, ops = recorded(sandbox, "buffered")
    monkeypatch.undo()
    faults, _ = faults_of(base, ops, "late header")
    assert any("generation 2 is torn" in fault for fault in faults)
