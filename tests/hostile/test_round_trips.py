# SPDX-License-Identifier: Apache-2.0
"""What the library writes it reads again: generations of anything that can be saved."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpi_ckpt.errors import CheckpointError, RegistrationError
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.states.nested import ObjectState
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.format import layout
from mpi_ckpt.storage.format.tensorfile import encode_header, parse_header
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.crash.world import scratch
from tests.making import Stream, save
from tests.restore import stranger

if TYPE_CHECKING:
    from pathlib import Path

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
state_names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20
)
arrays = st.one_of(
    hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    for dtype in (
        *("?", "u1", "<i2", "<u4", "<i8", "<f2", "<f4", "<f8", "<c8", "<c16"),
        *("<U3", "S4", "<M8[ns]", "<m8[D]", ">i4", ">f8"),
    )
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**2000), 2**2000)
    | st.floats()
    | st.complex_numbers()
    | texts
    | st.binary(max_size=20)
    | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(texts | st.integers() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(first, other) -> bool:
    """Compare nested values: arrays bit for bit, and -0.0 is not 0.0 elsewhere either."""
    if type(first) is not type(other):
        return False
    if isinstance(first, np.ndarray):
        little = first.astype(first.dtype.newbyteorder("<"))
        theirs = other.astype(other.dtype.newbyteorder("<"))
        return (little.dtype, first.shape, little.tobytes()) == (
            *(theirs.dtype, other.shape, theirs.tobytes()),
        )
    if isinstance(first, (float, complex)):
        return repr(first) == repr(other)
    if isinstance(first, (list, tuple)):
        return len(first) == len(other) and all(map(same, first, other))
    if isinstance(first, dict):
        return list(map(repr, first)) == list(map(repr, other)) and all(
            map(same, first.values(), other.values())
        )
    return first == other


def write(root: Path, states: list):
    directory = CheckpointDirectory(root)
    with closing(directory):
        directory.own()
        return save(directory, states).path


def read_into(path: Path, targets: list) -> None:
    """Restore states from a generation as a restore does, but for MPI."""
    with GenerationReader(path) as reader:
        verify(reader)
        for state in targets:
            stored = reader.manifest.state(state.name)
            blocks = [
                [reader.read_block(leaf, n) for n in range(len(leaf.digest.blocks))]
                for leaf in stored.leaves
            ]
            if stored.is_stream:
                state.data = b"".join(blocks[0])
                continue
            specs = [leaf.spec for leaf in stored.leaves]
            arrival = state.prepare(stored.structure, specs, strict=True)
            for leaf, pieces in zip(arrival.leaves, blocks, strict=True):
                leaf.buffer.write(memoryview(b"".join(pieces)))
            arrival.adopt()


@given(
    st.dictionaries(texts, arrays, max_size=4),
    values,
    st.binary(max_size=100),
    st.lists(state_names, min_size=3, max_size=3, unique=True),
)
def test_a_generation_holds_what_was_saved(held, value, stream, names):
    try:
        layout.check_names_differ(names)
        for name in names:
            layout.check_state_name(name)
    except RegistrationError:
        assume(False)
    states = [
        ArrayState(names[0], held), ObjectState(names[1], value), Stream(names[2], stream)
    ]  # fmt: skip
    root = scratch()
    try:
        try:
            path = write(root, states)
        except CheckpointError as error:
            assert "key" in str(error)  # noqa: PT017 (a value with a key like a pickled one's)
            return
        live = {name: np.zeros_like(array) for name, array in held.items()}
        targets = [ArrayState(names[0], live), ObjectState(names[1]), Stream(names[2])]
        read_into(path, targets)
        assert same(live, held)
        assert same(targets[1].value, value)
        assert targets[2].data == stream
        # And for whoever has nothing but docs/format.md.
        found = stranger.read(path)
        assert found.streams == {names[2]: stream}
        assert set(found.leaves[names[0]]) == set(held)
        for file in path.glob("rank-*"):  # none where there are no leaves
            assert len(safetensors.numpy.load_file(file)) >= len(held)
    finally:
        shutil.rmtree(root)


PAYLOADS = [
    ("<f4", [0x7F800001, 0x7FC00000, 0xFFC12345, 0xFF800001, 0x80000000, 1]),
    ("<f8", [0x7FF0000000000001, 0xFFF8DEADBEEF0001, 0x8000000000000000, 1]),
    ("<f2", [0x7C01, 0xFE00, 0x8000, 1]),
]


@pytest.mark.parametrize(("dtype", "bits"), PAYLOADS, ids=lambda value: str(value)[:5])
def test_every_kind_of_nan_and_minus_nothing_come_back_bit_for_bit(tmp_path, dtype, bits):
    held = np.array(bits, dtype.replace("f", "u")).view(dtype)
    path = write(tmp_path, [ArrayState("a", {"x": held})])
    live = {"x": np.zeros_like(held)}
    read_into(path, [ArrayState("a", live)])
    assert live["x"].tobytes() == held.tobytes()


known = st.sampled_from(
    ["BOOL", "U8", "I16", "F32", "F64", "BF16", "F8_E4M3", "F4_X2", "C64", "numpy:<U3"]
)
specs = st.builds(
    LeafSpec, texts, known, st.lists(st.integers(0, 4), max_size=4).map(tuple)
)


@given(st.lists(specs, unique_by=lambda spec: spec.name, max_size=6), texts)
def test_a_header_tells_what_it_was_made_of(leaves, note):
    assume(all(not leaf.name.startswith("__metadata__") for leaf in leaves))
    data = encode_header([(leaf.name, leaf) for leaf in leaves], {"note": note})
    found = parse_header(data[8:])
    assert found.pop("__metadata__") == {"note": note}
    assert list(found) == [leaf.name for leaf in leaves]
    reached = 0
    for leaf in leaves:
        dtype, shape = dtypes.stored_form(leaf.dtype, leaf.shape)
        entry = found[leaf.name]
        assert (entry["dtype"], entry["shape"]) == (dtype, list(shape))
        assert entry["data_offsets"] == [reached, reached + leaf.nbytes]
        reached += leaf.nbytes


@given(st.lists(state_names, min_size=1, max_size=6, unique=True))
def test_names_that_are_taken_make_different_files_also_where_case_is_not_told(names):
    try:
        layout.check_names_differ(names)
        for name in names:
            layout.check_state_name(name)
    except RegistrationError:
        return
    files = [layout.stream_file_name(name) for name in names]
    assert len({file.casefold() for file in files}) == len(files)
    for file in files:
        assert layout.check_file_name(file) == file
        assert json.loads(json.dumps(file)) == file
