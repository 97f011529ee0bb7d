# SPDX-License-Identifier: Apache-2.0
"""The table of tiles: as written so read, and forged tables lead nowhere."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import SaveError
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.digest import Digest, digest_bytes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.storage.format import tile_table
from mpi_ckpt.storage.format.manifest import StoredFile
from mpi_ckpt.storage.format.tile_table import (
    TileEntry,
    TileFilePlan,
    decode_tile_header,
    plan_tile_file,
    tile_name,
)

BLOCK = 16
DTYPES = ["U8", "BF16", "F64", "C128", "numpy:<U3", "F4_X2", "numpy:<M8[ns]"]


def file_of(plan: TileFilePlan, header: bytes) -> StoredFile:
    name = "tiles-00000.safetensors"
    return StoredFile(name, plan.nbytes, plan.header_bytes, digest_bytes(header), 1)


def filled(plan: TileFilePlan) -> tuple[bytes, list[Digest]]:
    """Return the data of a file, different for each tile, and the digests of its tiles."""
    pieces = [bytes([1 + n]) * plan.entries[at].nbytes for n, at in enumerate(plan.order)]
    return b"".join(pieces), [Digest.of(piece, plan.block_bytes) for piece in pieces]


@st.composite
def entries(draw: st.DrawFn) -> list[TileEntry]:
    """Draw tiles of a few leaves: rows of a box that is anywhere in its leaf."""
    drawn = []
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    for name in draw(st.lists(texts, unique=True, max_size=4)):
        lows = draw(st.lists(st.integers(0, 3), max_size=3))
        shape = [draw(st.integers(1, 3)) for _ in lows]
        pairs = zip(lows, shape, strict=True)
        ends = tuple(low + n + draw(st.integers(0, 2)) for low, n in pairs)
        spec = LeafSpec(name, draw(st.sampled_from(DTYPES)), ends)
        state = draw(st.sampled_from(["s", "a/b", "ä %"]))
        if not shape:
            drawn.append(TileEntry(state, spec, Box((), ())))
        for row in range(shape[0] if shape else 0):
            box = Box((lows[0] + row, *lows[1:]), (1, *shape[1:]))
            drawn.append(TileEntry(state, spec, box))
    return draw(st.permutations(drawn))


@given(entries())
def test_table_is_read_as_it_was_written(drawn):
    plan = plan_tile_file(drawn, BLOCK)
    data, digests = filled(plan)
    header = plan.encode(digests)
    assert len(header) == plan.header_bytes
    assert plan.header_bytes % 4096 == 0
    assert plan.nbytes == len(header) + len(data)
    tiles = decode_tile_header(header, file_of(plan, header), BLOCK)
    assert [(state, spec, tile.box) for state, spec, tile in tiles] == [
        plan.entries[at] for at in plan.order
    ]
    for (state, spec, tile), digest, offset in zip(
        tiles, digests, plan.offsets, strict=True
    ):
        leaf = tile.leaf
        assert leaf.digest == digest
        name = tile_name(state, spec.name, tile.box.offset)
        assert leaf.spec == LeafSpec(name, spec.dtype, tile.box.shape)
        assert (leaf.extent.offset, leaf.extent.nbytes) == (offset, leaf.spec.nbytes)
    widths = [dtypes.element_bytes(spec.dtype) for _, spec, _ in tiles]
    assert widths == sorted(widths, reverse=True)


@given(entries())
def test_safetensors_reads_single_tiles(drawn):
    plan = plan_tile_file(drawn, BLOCK)
    data, digests = filled(plan)
    tensors = dict(deserialize(plan.encode(digests) + data))
    assert len(tensors) == len(drawn)
    for number, at in enumerate(plan.order):
        state, spec, box = plan.entries[at]
        found = tensors[tile_name(state, spec.name, box.offset)]
        assert bytes(found["data"]) == bytes([1 + number]) * plan.entries[at].nbytes
        assert found["shape"][: len(box.shape)] == list(box.shape)


def small_plan() -> TileFilePlan:
    """Plan two tiles of several blocks, a scalar and a dtype that safetensors lacks."""
    rho = LeafSpec("rho", "F32", (4, 5))
    return plan_tile_file(
        [
            TileEntry("f/x", rho, Box((0, 0), (2, 5))),
            TileEntry("f/x", rho, Box((2, 0), (2, 3))),
            TileEntry("f/x", LeafSpec("one", "U8", ()), Box((), ())),
            TileEntry("g", LeafSpec("c", "C64", (3,)), Box((1,), (2,))),
        ],
        BLOCK,
    )


def small() -> tuple[bytes, StoredFile]:
    plan = small_plan()
    header = plan.encode(filled(plan)[1])
    return header, file_of(plan, header)


def test_names_and_order_of_tiles_are_those_of_the_document():
    header, file = small()
    tiles = decode_tile_header(header, file, BLOCK)
    assert [tile.leaf.spec.name for _, _, tile in tiles] == [
        *("g/c@1", "f%2Fx/rho@0,0", "f%2Fx/rho@2,0", "f%2Fx/one@")
    ]
    metadata = json.loads(header[8:])["__metadata__"]
    assert metadata["format"] == "mpi_ckpt"
    assert json.loads(metadata["mpi_ckpt.leaves"])[1] == ["f/x", "rho", "F32", [4, 5]]
    leaf, offset, digest, blocks = json.loads(metadata["mpi_ckpt.tiles"])[2]
    assert (leaf, offset) == (1, [2, 0])
    assert digest == digest_bytes(bytes.fromhex(blocks)).hex()
    assert json.loads(metadata["mpi_ckpt.tiles"])[3][3] == ""


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        (Box((0, 0), (5, 1)), "outside"),
        (Box((3, 4), (1, 2)), "outside"),
        (Box((-1, 0), (2, 2)), "outside"),
        (Box((0,), (2,)), "other dimensions"),
        (Box((0, 0), (0, 5)), "no elements"),
        (Box((1, 1), (-1, -1)), "no elements"),
    ],
)
def test_tiles_that_are_no_part_of_their_leaf_are_not_planned(box, fault):
    with pytest.raises(ValueError, match=fault):
        plan_tile_file([TileEntry("s", LeafSpec("rho", "F32", (4, 5)), box)])


def test_two_tiles_of_one_name_are_not_planned():
    spec = LeafSpec("rho", "F32", (4, 5))
    boxes = [Box((0, 0), (1, 5)), Box((0, 0), (2, 5))]
    with pytest.raises(ValueError, match="same element"):
        plan_tile_file([TileEntry("s", spec, box) for box in boxes])


def test_a_header_too_large_to_read_is_not_planned(monkeypatch):
    monkeypatch.setattr(tile_table, "TABLE_BYTES_MAX", 4096)
    spec = LeafSpec("rho", "F32", (1000,))
    few = [TileEntry("s", spec, Box((n,), (1,))) for n in range(10)]
    assert plan_tile_file(few).header_bytes == 4096
    many = [TileEntry("s", spec, Box((n,), (1,))) for n in range(40)]
    with pytest.raises(SaveError, match="40 tiles in one file need a header of 8192"):
        plan_tile_file(many)
    with pytest.raises(SaveError, match=r"nothing was published\. Use more hosts$"):
        plan_tile_file(many, advice="Use more hosts")


def forged(change: Any) -> tuple[bytes, StoredFile]:
    """Change header and table of a small file; lengths and padding stay right."""
    header, file = small()
    document = json.loads(header[8:])
    metadata = document["__metadata__"]
    tables = {key: json.loads(metadata[f"mpi_ckpt.{key}"]) for key in ("leaves", "tiles")}
    change(document, tables)
    for key, table in tables.items():
        if f"mpi_ckpt.{key}" in metadata:
            metadata[f"mpi_ckpt.{key}"] = json.dumps(table)
    text = json.dumps(document).encode().ljust(len(header) - 8)
    return len(text).to_bytes(8, "little") + text, file


def test_the_header_that_the_cases_below_change_is_whole():
    header, file = forged(lambda document, tables: None)
    assert decode_tile_header(header, file, BLOCK) == decode_tile_header(*small(), BLOCK)


def put(*path: Any) -> Any:
    """Return a change that puts the last of its arguments in place of a value."""
    *keys, last, value = path

    def change(document: Any, tables: Any) -> None:
        node = tables if keys[0] in tables else document
        for key in keys:
            node = node[key]
        node[last] = value

    return change


RHO = "f%2Fx/rho@0,0"
FORGERIES = {
    "a leaf that is not listed": put("tiles", 0, 0, 3),
    "a negative leaf": put("tiles", 0, 0, -1),
    "another leaf": put("tiles", 0, 0, 1),
    "another offset": put("tiles", 1, 1, [1, 0]),
    "an offset of other dimensions": put("tiles", 1, 1, [0]),
    "an offset below zero": put("tiles", 1, 1, [0, -1]),
    "an offset that is no list": put("tiles", 1, 1, "00"),
    "an offset that is a fraction": put("tiles", 1, 1, [0.0, 0]),
    "too few blocks": put("tiles", 1, 3, "00" * 16),
    "no blocks": put("tiles", 1, 3, ""),
    "blocks that are no text": put("tiles", 3, 3, None),
    "blocks of another digest": put("tiles", 1, 3, "00" * 48),
    "no digest": put("tiles", 0, 2, ""),
    "a digest that is no text": put("tiles", 0, 2, 0),
    "a row of the table that is too short": put("tiles", 0, [0]),
    "a row of the table that is no list": put("tiles", 0, 7),
    "one leaf in place of another": put("leaves", 0, ["g", "d", "C64", [3]]),
    "another dtype": put("leaves", 1, 2, "I32"),
    "an unknown dtype": put("leaves", 0, 2, "C65"),
    "a leaf too small for its tiles": put("leaves", 1, 3, [3, 5]),
    "a leaf of other dimensions": put("leaves", 1, 3, [20]),
    "a leaf that is huge": put("leaves", 1, 3, [1 << 61, 5]),
    "a leaf listed twice": put("leaves", 2, ["f/x", "rho", "U8", []]),
    "a tensor of another dtype": put(RHO, "dtype", "I32"),
    "a tensor of another shape": put(RHO, "shape", [5, 2]),
    "a tensor of more elements": put(RHO, "shape", [2, 6]),
    "a tensor without a shape": put("g/c@1", "shape", []),
    "a tensor whose shape is no list": put(RHO, "shape", "25"),
    "a tensor elsewhere": put(RHO, "data_offsets", [0, 40]),
    "a tensor of fewer bytes": put(RHO, "data_offsets", [16, 52]),
    "offsets that are no list": put(RHO, "data_offsets", {}),
    "three offsets": put(RHO, "data_offsets", [16, 56, 60]),
    "a table that is no list": lambda _, tables: tables.update(tiles={}),
    "a tensor that the table lacks": lambda document, _: document.update(
        more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    ),
    "a tile that the table lacks": lambda _, tables: tables["tiles"].pop(),
    "a tile twice": lambda _, tables: tables["tiles"].append(tables["tiles"][0]),
    "tiles in another order": lambda _, tables: tables["tiles"].reverse(),
    "no table": lambda document, _: document["__metadata__"].pop("mpi_ckpt.tiles"),
    "no leaves": lambda document, _: document["__metadata__"].pop("mpi_ckpt.leaves"),
    "no metadata": lambda document, _: document.update(__metadata__=[]),
    "a tensor gone": lambda document, _: document.pop(RHO),
    "a tensor that is no object": lambda document, _: document.update({RHO: 5}),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_forged_tables_are_refused(change):
    header, file = forged(change)
    with pytest.raises(ValueError, match=r".+"):
        decode_tile_header(header, file, BLOCK)


def test_a_table_of_another_file_is_refused():
    header, file = small()
    for changed in (
        StoredFile(file.name, file.nbytes + 1, file.header_bytes, b"", 1),
        StoredFile(file.name, file.nbytes, file.header_bytes + 1, b"", 1),
    ):
        with pytest.raises(ValueError, match=r".+"):
            decode_tile_header(header, changed, BLOCK)
    with pytest.raises(ValueError, match="number of blocks"):
        decode_tile_header(header, file, BLOCK * 2)


@pytest.mark.parametrize("length", [0, 7, 4000, 4087, 4089, 1 << 40])
def test_a_header_of_another_length_is_refused(length):
    header, file = small()
    header = length.to_bytes(8, "little") + header[8:]
    with pytest.raises(ValueError, match="by its own length"):
        decode_tile_header(header, file, BLOCK)


def test_a_header_larger_than_any_writer_makes_is_refused(monkeypatch):
    header, file = small()
    monkeypatch.setattr(tile_table, "TABLE_BYTES_MAX", 4095)
    with pytest.raises(ValueError, match="no header of tiles"):
        decode_tile_header(header, file, BLOCK)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.data())
def test_any_value_in_place_of_any_other_is_refused_or_read(data):
    def change(document, tables):
        node: Any = data.draw(st.sampled_from([document, tables]))
        while True:
            keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys))
            inner = node[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                break
            node = inner
        node[key] = copy.deepcopy(data.draw(values))

    try:
        header, file = forged(change)
    except (TypeError, OverflowError):  # the metadata is no object any more
        return
    try:
        tiles = decode_tile_header(header, file, BLOCK)
    except ValueError:
        return
    spans = [(t.leaf.extent.offset, t.leaf.extent.nbytes) for _, _, t in tiles]
    ends = [file.header_bytes, *(start + length for start, length in spans)]
    assert [start for start, _ in spans] == ends[:-1]
    assert ends[-1] == file.nbytes
    for _, spec, tile in tiles:
        assert tile.box.end <= spec.shape or not spec.shape
        assert tile.leaf.spec.nbytes == tile.leaf.extent.nbytes
        np.testing.assert_array_less(-1, tile.box.offset)


@given(st.binary(max_size=200))
def test_rubbish_is_refused(rubbish):
    header = len(rubbish).to_bytes(8, "little") + rubbish
    file = StoredFile("tiles-00000.safetensors", len(header), len(header), b"", 1)
    with pytest.raises(ValueError, match=r".+"):
        decode_tile_header(header, file, BLOCK)
