# SPDX-License-Identifier: Apache-2.0
"""Bytes that flip and files that are cut off: every whole restore must see it and go back.

The newest of three generations shares a file with the one before it, has two of its own and
a plain state. By default a sample is tried, drawn by the seed of the crash tests. With
MPI_CKPT_TEST_STRESS=1 every byte and every length of a checkpoint of 64 KiB, every tenth by
a whole restore, and 10,000 flips in one of 64 MiB, every hundredth by a whole restore.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mpi4py import MPI

from mpi_ckpt import IO, ArrayState, CheckpointManager, KeepLast, Options
from mpi_ckpt.errors import CorruptGenerationError
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.crash.world import scratch
from tests.draws import SEED, STRESS, TIMES
from tests.hostile.world import MANIFEST
from tests.making import Stream

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [f"checkpoint-{number:08d}" for number in (1, 2, 3)]
SMALL, LARGE = 64 << 10, 64 << 20


class World:
    """Three generations of a size, in memory, to be damaged and repaired many times."""

    def __init__(self, nbytes: int) -> None:
        self.root = scratch()
        self.frozen = np.random.default_rng(9).integers(0, 256, nbytes // 2, np.uint8)
        self.count = nbytes // 2 - 4096 - 2000
        for number in (1, 2, 3):
            self.save(number)
        self.live = self._live_ranges(NAMES[2])
        self.files = {name: self.root / NAMES[2] / name for name in self.live}

    def manager(self, *states, **options) -> CheckpointManager:
        options = Options(preemption_signals=(), retention=KeepLast(9), **options)
        return CheckpointManager(self.root, states, comm=MPI.COMM_SELF, options=options)

    def changing(self, number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, 256, self.count, np.uint8)

    def save(self, number: int) -> None:
        arrays = {"frozen": self.frozen, "changing": self.changing(number)}
        plain = Stream("plain", bytes([number]) * 500)
        # The third takes what did not change from the second; the first is on its own.
        with self.manager(
            ArrayState("arrays", arrays), plain, io=IO(reuse=number == 3)
        ) as manager:
            manager.save(number)

    def restore(self) -> tuple[int, list[str]]:
        """Restore; return which came, by its contents, and which were set aside.

        Raises:
            CorruptGenerationError: If none is good.
        """
        arrays = {
            "frozen": np.zeros_like(self.frozen),
            "changing": np.zeros(self.count, np.uint8),
        }
        plain = Stream("plain")
        with self.manager(ArrayState("arrays", arrays), plain) as manager:
            report = manager.restore()
        number = report.generation
        assert np.array_equal(arrays["frozen"], self.frozen)
        assert np.array_equal(arrays["changing"], self.changing(number))
        assert plain.data == bytes([number]) * 500
        return number, sorted(os.path.basename(path) for path in report.quarantined)

    def put_back(self) -> None:
        """Move what was set aside to where it was."""
        for name in NAMES:
            aside = self.root / ".quarantine" / name
            if aside.exists():
                (aside / "reason.json").unlink()
                aside.rename(self.root / name)

    def is_live(self, name: str, position: int) -> bool:
        """Tell whether the newest generation uses a byte of a file of its."""
        return any(start <= position < end for start, end in self.live[name])

    def is_seen(self, name: str, position: int) -> bool:
        """Tell whether a reader of the newest generation refuses a byte."""
        try:
            with GenerationReader(self.root / NAMES[2]) as reader:
                block_bytes = reader.manifest.block_bytes
                for state in reader.manifest.states:
                    for leaf in state.leaves:
                        inside = position - leaf.extent.offset
                        if leaf.extent.file == name and 0 <= inside < leaf.spec.nbytes:
                            reader.read_block(leaf, inside // block_bytes)
        except CorruptGenerationError:
            return True
        return False

    def _live_ranges(self, generation: str) -> dict[str, list[tuple[int, int]]]:
        with GenerationReader(self.root / generation) as reader:
            manifest = reader.manifest
        ranges = {file.name: [(0, file.header_bytes)] for file in manifest.files}
        for state in manifest.states:
            for leaf in state.leaves:
                file, offset, nbytes = leaf.extent
                ranges[file].append((offset, offset + nbytes))
        size = (self.root / generation / MANIFEST).stat().st_size
        return {**ranges, MANIFEST: [(0, size)]}


@pytest.fixture(scope="module")
def small():
    world = World(SMALL)
    yield world
    shutil.rmtree(world.root)


@pytest.fixture(scope="module")
def large():
    world = World(LARGE)
    yield world
    shutil.rmtree(world.root)


@pytest.fixture(autouse=True)
def only_errors(caplog):
    """Ten thousand warnings take memory."""
    caplog.set_level(logging.ERROR)


def flip(file: Path, position: int, bit: int) -> None:
    """Flip a bit where the bytes are: under all names of the file."""
    with file.open("r+b", buffering=0) as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1 << bit]))


def expect(world: World, name: str, damaged: str, *, live: bool) -> None:
    """Restore; what comes must be the newest that the damage does not touch."""
    shared = world.files[name].stat().st_nlink > 1
    number, aside = world.restore()
    world.put_back()
    expected = (3, []) if not live else (1, NAMES[1:]) if shared else (2, NAMES[2:])
    assert (number, aside) == expected, f"{damaged}, seed {SEED}"


def sampled(places: list, count: int) -> list[tuple[str, int, bool]]:
    """Choose places to damage, and whether a whole restore is to find it."""
    if STRESS:
        return [(*place, number % 10 == 0) for number, place in enumerate(places)]
    chosen = random.Random(SEED).sample(places, min(count, len(places)))
    return [(*place, True) for place in chosen]


def test_the_newest_generation_has_a_file_of_each_kind(small):
    assert sorted(small.files) == [
        MANIFEST,
        "plain.bin",
        "rank-00000.from-00000002.safetensors",
        "rank-00000.safetensors",
    ]
    links = {name: file.stat().st_nlink for name, file in small.files.items()}
    assert links.pop("rank-00000.from-00000002.safetensors") == 2
    assert set(links.values()) == {1}
    assert small.restore() == (3, [])
    total = sum(file.stat().st_size for file in small.files.values())
    assert SMALL <= total <= 2 * SMALL


@pytest.mark.timeout(7200 if STRESS else 120 * TIMES)
def test_flipped_bytes_are_seen_and_the_one_before_is_taken(small):
    places = [
        (name, position)
        for name, file in small.files.items()
        for position in range(file.stat().st_size)
    ]
    for name, position, whole in sampled(places, 400 * TIMES):
        flip(small.files[name], position, position % 8)
        live = small.is_live(name, position)
        damaged = f"byte {position} of {name} flipped"
        assert small.is_seen(name, position) == live, f"{damaged}, seed {SEED}"
        if whole:
            expect(small, name, damaged, live=live)
        flip(small.files[name], position, position % 8)
    assert small.restore() == (3, [])


@pytest.mark.timeout(7200 if STRESS else 120 * TIMES)
def test_files_cut_at_any_length_are_seen_and_the_one_before_is_taken(small):
    contents = {name: file.read_bytes() for name, file in small.files.items()}
    places = [(name, n) for name, data in contents.items() for n in range(len(data))]
    for name, length, whole in sampled(places, 200 * TIMES):
        os.truncate(small.files[name], length)
        damaged = f"{name} cut to {length} bytes"
        assert small.is_seen(name, length), f"{damaged}, seed {SEED}"
        if whole:
            expect(small, name, damaged, live=True)
        with small.files[name].open("r+b") as file:
            file.write(contents[name])
    assert small.restore() == (3, [])


@pytest.mark.timeout(7200 if STRESS else 120 * TIMES)
def test_single_bits_of_a_large_one_are_seen(large):
    rng = random.Random(SEED)
    names = sorted(large.files)
    sizes = [large.files[name].stat().st_size for name in names]
    assert sum(sizes) >= LARGE
    for number in range(10_000 if STRESS else 60 * TIMES):
        (name,) = rng.choices(names, sizes)
        position = rng.randrange(large.files[name].stat().st_size)
        bit = rng.randrange(8)
        flip(large.files[name], position, bit)
        live = large.is_live(name, position)
        damaged = f"bit {bit} of byte {position} of {name}"
        assert large.is_seen(name, position) == live, f"{damaged}, seed {SEED}"
        if number % (100 if STRESS else 15) == 0:
            expect(large, name, damaged, live=live)
        flip(large.files[name], position, bit)
    assert large.restore() == (3, [])


def test_where_all_are_bad_it_is_an_error_that_names_each(small):
    positions = [(small.root / name / "plain.bin", 7) for name in NAMES]
    for file, position in positions:
        flip(file, position, 0)
    with pytest.raises(CorruptGenerationError) as caught:
        small.restore()
    assert all(name in str(caught.value) for name in NAMES)
    small.put_back()
    for file, position in positions:
        flip(file, position, 0)
    assert small.restore() == (3, [])
