# SPDX-License-Identifier: Apache-2.0
"""Tiles in files: written with the header last, found again, and proven."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import CorruptGenerationError, ReadError, WriteError
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.format.manifest_codec import decode, encode
from mpi_ckpt.storage.reading import tile_index
from mpi_ckpt.storage.reading.proving import proven_blocks, verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from mpi_ckpt.storage.writing.partial import Partial
from tests.cutting import CutArray, bytes_of, write_cut
from tests.recording import RecordingOS

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 64


def some_arrays() -> dict[str, CutArray]:
    """Return arrays of three ranks, of which the second has no row of ``rows``."""
    field = np.arange(60, dtype=np.float32).reshape(6, 10)
    quarters = [
        [Box((0, 0), (3, 4)), Box((3, 0), (3, 4))],
        [Box((0, 4), (6, 3))],
        [Box((0, 7), (6, 3))],
    ]
    return {
        "field": CutArray(field, quarters),
        "rows": CutArray.by_rows(np.arange(14).reshape(7, 2), [3, 0, 4]),
        "one": CutArray(np.array(2.5 + 1j), [[], [Box((), ())], []]),
        "none": CutArray.by_rows(np.empty((0, 3), np.int8), [0, 0, 0]),
        "words": CutArray.by_rows(np.array(["ä", "bc", "d"]), [1, 1, 1]),
    }


@pytest.fixture
def generation(tmp_path) -> Path:
    return write_cut(tmp_path / "c", some_arrays(), block_bytes=BLOCK)


def assembled(reader: GenerationReader, name: str, array: np.ndarray) -> np.ndarray:
    """Put a leaf together from its tiles, box by box."""
    whole = np.zeros_like(array)
    for tile in reader.tiles()["fields", name]:
        blocks = range(len(tile.leaf.digest.blocks))
        data = b"".join(reader.read_block(tile.leaf, block) for block in blocks)
        inside = tuple(
            slice(o, e) for o, e in zip(tile.box.offset, tile.box.end, strict=True)
        )
        whole[inside] = np.frombuffer(data, array.dtype).reshape(tile.box.shape)
    return whole


def test_tiles_are_found_and_make_up_the_arrays(generation):
    names = sorted(path.name for path in generation.iterdir())
    assert names == ["manifest.json", *(f"tiles-0000{n}.safetensors" for n in range(3))]
    with GenerationReader(generation) as reader:
        assert reader.tiles() is reader.tiles()
        for name, cut in some_arrays().items():
            boxes = [tile.box for tile in reader.tiles()["fields", name]]
            assert boxes == [box for rank in cut.boxes for box in rank]
            np.testing.assert_array_equal(
                assembled(reader, name, cut.array), cut.array, strict=True
            )
        verify(reader)
        assert reader.manifest.nbytes == sum(
            one.array.nbytes for one in some_arrays().values()
        )


def test_safetensors_reads_each_file_of_tiles(generation):
    arrays, found = some_arrays(), 0
    for file in generation.glob("tiles-*.safetensors"):
        tensors = dict(deserialize(file.read_bytes()))
        for name, tensor in tensors.items():
            leaf, _, offset = name.removeprefix("fields/").partition("@")
            start = tuple(int(one) for one in offset.split(",") if one)
            cut = arrays[leaf]
            (box,) = (b for rank in cut.boxes for b in rank if b.offset == start)
            assert bytes(tensor["data"]) == bytes(bytes_of(cut.array, box))
            found += 1
    assert found == sum(len(rank) for one in arrays.values() for rank in one.boxes)


@given(st.data())
def test_any_cut_of_any_array_is_found_again(tmp_path_factory, data):
    rows = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    width = data.draw(st.integers(0, 9))
    dtype = data.draw(st.sampled_from([np.int8, np.float64, np.complex128, "<U3"]))
    shape = (sum(rows), width)
    array = np.arange(sum(rows) * width).reshape(shape).astype(dtype)
    boxes = CutArray.by_rows(array, rows).boxes if width else [[] for _ in rows]
    root = tmp_path_factory.mktemp("c")
    path = write_cut(root, {"x": CutArray(array, boxes)}, block_bytes=BLOCK)
    with GenerationReader(path) as reader:
        np.testing.assert_array_equal(assembled(reader, "x", array), array, strict=True)
        verify(reader)


@pytest.mark.parametrize("mode", ["auto", "direct", "buffered"])
def test_header_is_written_last_and_one_fsync_comes_after_it(tmp_path, monkeypatch, mode):
    recorder = RecordingOS()
    monkeypatch.setattr(filesystem, "os", recorder)
    partial = Partial(tmp_path, 1, "job", mode=mode)
    data = os.urandom((9 << 20) + 5)
    header = os.urandom(8192)
    used = []

    def runs():
        for start in range(0, len(data), 1 << 20):
            yield memoryview(data)[start : start + (1 << 20)]
        used.append("all")

    def late():
        assert used == ["all"]
        return header

    path = partial.path / "tiles-00000.safetensors"
    partial.write_headed(path.name, len(header), runs(), late, len(header) + len(data))
    assert path.read_bytes() == header + data
    assert partial.bytes_written == len(header) + len(data)
    calls = [call for call in recorder.calls if call[1] == str(path)]
    names = [name for name, _ in calls if name in ("pwrite", "fsync")]
    assert names[-2:] == ["pwrite", "fsync"]
    assert names.count("fsync") == 1


def test_header_of_another_length_is_not_written(tmp_path):
    partial = Partial(tmp_path, 1, "job")
    with pytest.raises(AssertionError):
        partial.write_headed("a", 4096, [memoryview(b"x")], lambda: bytes(4097), 4097)


def test_file_of_tiles_that_does_not_fit_is_refused(tmp_path):
    partial = Partial(tmp_path, 1, "job")
    with pytest.raises(WriteError, match="ENOSPC"):
        partial.write_headed("a", 4096, [], lambda: bytes(4096), 1 << 60)


def test_every_flipped_byte_of_a_file_of_tiles_is_seen(generation):
    file = generation / "tiles-00000.safetensors"
    data = file.read_bytes()
    positions = [*range(0, 4096, 61), *range(4096, len(data))]
    for position in positions:
        changed = bytearray(data)
        changed[position] ^= 1
        file.write_bytes(changed)
        with (
            pytest.raises(CorruptGenerationError, match=str(file)),
            GenerationReader(generation) as reader,
        ):
            verify(reader)
    file.write_bytes(data)
    with GenerationReader(generation) as reader:
        verify(reader)


def test_header_that_changes_after_the_opening_is_seen(generation):
    file = generation / "tiles-00001.safetensors"
    with GenerationReader(generation) as reader:
        data = bytearray(file.read_bytes())
        data[20] ^= 1
        file.write_bytes(data)
        with pytest.raises(CorruptGenerationError, match="does not match its digest"):
            reader.tiles()


def test_file_that_vanishes_after_the_opening_is_seen(generation):
    with GenerationReader(generation) as reader:
        reader.close()
        (generation / "tiles-00002.safetensors").unlink()
        with pytest.raises(CorruptGenerationError, match="tiles-00002"):
            reader.tiles()


def test_file_that_cannot_be_read_is_no_damage(generation, monkeypatch):
    with GenerationReader(generation) as reader:

        def refuse(*_):
            raise OSError(5, "I/O error")

        monkeypatch.setattr(filesystem, "read_at", refuse)
        with pytest.raises(ReadError, match="tiles-00000"):
            reader.tiles()


def rewritten(path: Path, change) -> None:
    """Change the manifest of a generation; its own digest stays right."""
    file = path / "manifest.json"
    file.write_bytes(encode(change(decode(file.read_bytes()))))


def with_state(manifest, **members):
    state, *others = manifest.states
    return replace(manifest, states=(replace(state, **members), *others))


def with_leaf(name: str, **members):
    """Return a change of one cut leaf in the manifest."""

    def change(manifest):
        cut = tuple(
            one._replace(**members) if one.spec.name == name else one
            for one in manifest.states[0].cut
        )
        return with_state(manifest, cut=cut)

    return change


CONTRADICTIONS = {
    "another dtype": (
        with_leaf("field", spec=LeafSpec("field", "I32", (6, 10))),
        "state 'fields', leaf 'field', tile .0:3, 0:4.: the table has 'field F32",
    ),
    "another shape": (
        with_leaf("field", spec=LeafSpec("field", "F32", (6, 11))),
        "the manifest 'field F32.6, 11.'",
    ),
    "more tiles": (
        with_leaf("rows", tiles=3),
        "leaf 'rows': the files have 2 tiles of it, the manifest lists 3",
    ),
    "a leaf that is not listed": (
        lambda manifest: with_state(manifest, cut=manifest.states[0].cut[1:]),
        "leaf 'field', tile .0:3, 0:4.: the table has .*, the manifest no such cut leaf",
    ),
    "a file that the state does not name": (
        lambda manifest: with_state(manifest, files=manifest.states[0].files[1:]),
        "leaf 'field': the files have 2 tiles of it, the manifest lists 4",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_manifest_that_contradicts_the_tables_is_refused(generation, case):
    change, message = CONTRADICTIONS[case]
    rewritten(generation, change)
    with (
        GenerationReader(generation) as reader,
        pytest.raises(CorruptGenerationError, match=message) as caught,
    ):
        verify(reader)
    file = generation / "tiles-00000.safetensors"
    assert caught.value.path in (str(generation), str(file))
    assert caught.value.generation == 1


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            [[Box((0, 0), (2, 3))], [Box((2, 0), (1, 3))]],
            r"leaf 'x': no rank holds \[3:4, 0:3\]",
        ),
        (
            [[Box((0, 0), (3, 3))], [Box((2, 0), (1, 3))]],
            r"overlap at \[2:3, 0:3\] in tiles-00000.safetensors and tiles-00001",
        ),
        (
            [[Box((0, 0), (2, 3))], [Box((0, 0), (2, 3))]],
            r"tile \[0:2, 0:3\] is in tiles-00000.safetensors and tiles-00001",
        ),
    ],
)
def test_tiles_that_do_not_make_up_the_leaf_are_refused(tmp_path, boxes, message):
    array = np.arange(12.0).reshape(4, 3)
    path = write_cut(tmp_path / "c", {"x": CutArray(array, boxes)})
    with (
        GenerationReader(path) as reader,
        pytest.raises(CorruptGenerationError, match=message),
    ):
        reader.tiles()


def test_a_forged_leaf_larger_than_any_search_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_index, "_SEARCHED_ELEMENTS_MAX", 11)
    boxes = [[Box((0, 0), (2, 3))]]
    path = write_cut(tmp_path / "c", {"x": CutArray(np.ones((4, 3)), boxes)})
    with (
        GenerationReader(path) as reader,
        pytest.raises(CorruptGenerationError, match="have 6 elements, the leaf has 12"),
    ):
        reader.tiles()


def test_tiles_of_states_that_do_not_name_the_file_are_dead(generation):
    def without(manifest):
        file = replace(manifest.files[0], generation=0)
        return replace(manifest, files=(file, *manifest.files[1:]), states=())

    rewritten(generation, without)
    with GenerationReader(generation) as reader:
        assert reader.tiles() == {}
        assert reader.leaves() == []
        verify(reader)


def test_a_header_too_large_for_a_table_is_not_read(generation, monkeypatch):
    monkeypatch.setattr("mpi_ckpt.storage.reading.file_reader.TABLE_BYTES_MAX", 4095)
    with (
        GenerationReader(generation) as reader,
        pytest.raises(CorruptGenerationError, match="4096 bytes are no header"),
    ):
        reader.tiles()


def test_windows_prove_tiles_as_they_do_leaves(generation):
    with GenerationReader(generation) as reader:
        leaves = reader.leaves()
        found = [bytearray(leaf.spec.nbytes) for leaf in leaves]
        for block, data in proven_blocks(reader, leaves, window_bytes=256):
            found[block.leaf][block.start : block.end] = data
    for leaf, data in zip(leaves, found, strict=True):
        blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
        assert [digest_bytes(block) for block in blocks] == list(leaf.digest.blocks)


def test_version_of_the_manifest_is_2(generation):
    assert json.loads((generation / "manifest.json").read_bytes())["version"] == 2


class TestHeadersThatOtherRanksRead:
    """A reader on root that opens no file of tiles takes their headers from others."""

    @pytest.fixture
    def headers(self, generation):
        with GenerationReader(generation, tiles_later=True) as reader:
            return {file.name: reader.read_header(file) for file in reader.unproven}

    def test_they_give_the_same_tiles(self, generation, headers):
        with (
            GenerationReader(generation) as alone,
            GenerationReader(generation, tiles_later=True) as reader,
        ):
            assert [file.name for file in reader.unproven] == list(headers)
            reader.take_headers(headers)
            assert reader.unproven == []
            assert reader.tiles() == alone.tiles()

    def test_other_bytes_are_refused(self, generation, headers):
        name = next(iter(headers))
        spoilt = {**headers, name: headers[name][:-1] + b"!"}
        with (
            GenerationReader(generation, tiles_later=True) as reader,
            pytest.raises(CorruptGenerationError, match=f"{name}.* does not match"),
        ):
            reader.take_headers(spoilt)

    @pytest.mark.parametrize("prove", ["prove_rest", "tiles"])
    def test_a_missing_file_is_found_though_nobody_needs_it(self, generation, prove):
        (generation / "tiles-00001.safetensors").unlink()
        with (
            GenerationReader(generation, tiles_later=True) as reader,
            pytest.raises(CorruptGenerationError, match="tiles-00001"),
        ):
            getattr(reader, prove)()
