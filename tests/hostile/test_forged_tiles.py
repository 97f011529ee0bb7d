# SPDX-License-Identifier: Apache-2.0
"""Generations whose tables of tiles were forged, with right digests: read, or refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import mpi_ckpt
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.leaves.digest import digest_bytes
from tests.commands import run
from tests.cutting import CutArray, write_cut
from tests.hostile.watch import watched
from tests.making import document_of, sealed_document

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILES = [f"tiles-0000{rank}.safetensors" for rank in range(2)]


@pytest.fixture
def generation(tmp_path) -> Path:
    halves = [[Box((0, 0), (4, 3))], [Box((0, 3), (4, 3))]]
    rho = np.arange(24, dtype=np.int16).reshape(4, 6)
    write_cut(tmp_path / "root", {"rho": CutArray(rho, halves)})
    arrays = {"rho": CutArray(rho, halves)}
    return write_cut(tmp_path / "root", arrays, generation=2, block_bytes=16)


def forge_table(path: Path, number: int, change: Callable[[Any, Any], object]) -> None:
    """Change header and tables of a file; all digests and lengths are right again."""
    file = path / FILES[number]
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    tables = {key: json.loads(metadata[f"mpi_ckpt.{key}"]) for key in ("leaves", "tiles")}
    change(header, tables)
    for key, table in tables.items():
        metadata[f"mpi_ckpt.{key}"] = json.dumps(table)
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    def seal(document: dict) -> None:
        entry = document["files"][number]
        entry["header_digest"] = digest_bytes(file.read_bytes()[: 8 + len(text)]).hex()
        entry["header_bytes"] = 8 + len(text)
        entry["bytes"] = file.stat().st_size

    forge_manifest(path, seal)


def forge_manifest(path: Path, change: Callable[[dict], object]) -> None:
    document = document_of(path)
    change(document)
    (path / "manifest.json").write_bytes(sealed_document(document))


def table(number: int = 0, **members: Any):
    """Return a forgery that puts values into the first row of a file's table of tiles."""
    places = {"leaf": 0, "offset": 1, "digest": 2, "blocks": 3}

    def change(header: Any, tables: Any) -> None:
        for name, value in members.items():
            tables["tiles"][0][places[name]] = value

    return lambda path: forge_table(path, number, change)


def whole_shape(shape: list[int], tiles: int = 2):
    """Return a forgery of the whole shape, in both tables and in the manifest."""

    def change(header: Any, tables: Any) -> None:
        tables["leaves"][0][3] = shape

    def forge(path: Path) -> None:
        for number in range(2):
            forge_table(path, number, change)
        forge_manifest(
            path, lambda d: d["states"][0]["cut"][0].update(shape=shape, tiles=tiles)
        )

    return forge


def cut(**members: Any):
    return lambda path: forge_manifest(
        path, lambda d: d["states"][0]["cut"][0].update(members)
    )


def state(**members: Any):
    return lambda path: forge_manifest(path, lambda d: d["states"][0].update(members))


def rename_tile(header: Any, _: Any) -> None:
    header["../../x"] = header.pop("fields/rho@0,0")


def deep_table(header: Any, tables: Any) -> None:
    tables["tiles"] = "[" * 100_000


def long_offset(header: Any, tables: Any) -> None:
    tables["tiles"][0][1] = [0] * 10_000


def huge_number(header: Any, tables: Any) -> None:
    tables["tiles"][0][1] = [10**300, 0]


FORGERIES = {
    "a tile over another": table(1, offset=[0, 2]),
    "a tile outside": table(1, offset=[0, 4]),
    "an offset below zero": table(1, offset=[0, -3]),
    "a hole": whole_shape([4, 7]),
    "a whole leaf that is huge": whole_shape([1 << 59, 6]),
    "a whole leaf larger than any number of 64 bits": whole_shape([1 << 60, 1 << 60]),
    "a whole leaf of other dimensions": whole_shape([24]),
    "a digest of other bytes": table(0, digest="00" * 16),
    "no blocks": table(0, blocks=""),
    "a leaf that is not there": table(0, leaf=1),
    "more tiles in the manifest": cut(tiles=3),
    "a million tiles in the manifest": cut(tiles=10**6),
    "another dtype in the manifest": cut(dtype="U16"),
    "another whole shape in the manifest": cut(shape=[6, 4]),
    "another name in the manifest": cut(name="other"),
    "one file in place of two": state(tile_files=FILES[:1]),
    "a file twice": state(tile_files=[FILES[0]] * 2),
    "a file that leads outside": state(tile_files=["../checkpoint-00000001/" + FILES[0]]),
    "a tensor that leads outside": lambda path: forge_table(path, 0, rename_tile),
    "a table that is deep": lambda path: forge_table(path, 0, deep_table),
    "an offset of 10,000 dimensions": lambda path: forge_table(path, 0, long_offset),
    "an offset of 300 digits": lambda path: forge_table(path, 0, huge_number),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_tiles_are_refused_and_nothing_else_happens(generation, name):
    FORGERIES[name](generation)
    root = generation.parent
    with (
        watched(root),
        pytest.raises(CheckpointError) as caught,
        mpi_ckpt.load(root, 2) as saved,
    ):
        saved.verify()
    assert len(str(caught.value)) < 3000
    assert str(caught.value).replace("\n", "").isprintable()
    nowhere = root / "nothing is written here"
    for words in (
        ("ls", root),
        ("show", root, "2", "--leaf", "rho"),
        ("diff", root, "1", "2"),
        ("export", root, "2", "--to", nowhere / "x.safetensors"),
        ("verify", root, "2"),
    ):
        with watched(nowhere):
            answer = run(*words)
        output = answer.stdout + answer.stderr
        assert answer.exit_code in (0, 1, 2)
        assert output.replace("\n", "").isprintable()
        assert len(output) < 20_000
        if words[0] == "verify":
            assert answer.exit_code == 1


def test_the_generation_that_the_forgeries_change_is_good(generation):
    forge_table(generation, 0, lambda header, tables: None)
    forge_manifest(generation, lambda document: None)
    with mpi_ckpt.load(generation.parent, 2) as saved:
        saved.verify()
        assert saved["fields"]["rho"].tolist() == np.arange(24).reshape(4, 6).tolist()


def test_thousands_of_tiles_that_all_overlap_cost_little(tmp_path):
    count = 3000
    array = np.zeros(count * count, np.uint8)
    boxes = [Box((start,), (count,)) for start in range(count)]
    path = write_cut(tmp_path / "root", {"x": CutArray(array, [boxes])})
    with (
        watched(path.parent),
        pytest.raises(CheckpointError, match="overlap"),
        mpi_ckpt.load(path.parent) as saved,
    ):
        _ = saved["fields"]["x"]
