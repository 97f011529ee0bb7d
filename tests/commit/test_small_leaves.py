# SPDX-License-Identifier: Apache-2.0
"""Many leaves at once have the bytes, digests and places that each has alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.engine.save import shard
from mpi_ckpt.engine.sync.captured import capture_states, digest_states
from mpi_ckpt.leaves.buckets import (
    Leaves,
    find_spans,
    join_leaves,
    read_leaves,
    write_leaves,
)
from mpi_ckpt.leaves.digest import Digest
from mpi_ckpt.loading import load
from mpi_ckpt.states.arrays import ArrayState, array_leaf
from mpi_ckpt.states.buffers.array_bytes import ArrayBuffer
from mpi_ckpt.storage.reading.reader import read_manifest
from tests.making import publish

DTYPES = ["f4", "f8", "i2", "?", "u1", "c8", ">f4", "M8[s]", "S3", "i4,f8"]
SHAPES = [(), (0,), (1,), (3,), (2, 0), (2, 3), (1, 1, 5)]
LAYOUTS = ["C", "F", "strided", "reversed"]


def array_of(dtype: str, shape: tuple[int, ...], layout: str, seed: int) -> np.ndarray:
    """Return an array of random bytes that lies in memory as a layout says."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=int))
    data = np.random.default_rng(seed).integers(0, 2, count * kind.itemsize, np.uint8)
    plain = data.view(kind).reshape(shape)
    if layout == "C" or not shape:
        return plain
    if layout == "F":
        return np.asfortranarray(plain)
    if layout == "strided":
        wide = np.zeros((*shape[:-1], 2 * shape[-1]), kind)
        wide[..., ::2] = plain
        return wide[..., ::2]
    return np.ascontiguousarray(plain[::-1])[::-1]


ONE = st.tuples(
    st.sampled_from(DTYPES),
    st.sampled_from(SHAPES),
    st.sampled_from(LAYOUTS),
    st.integers(0, 9),
)
# Some lists of arrays that are alike, as those of a program are; others mixed.
MANY = st.one_of(
    st.lists(ONE, min_size=1, max_size=8),
    st.tuples(ONE, st.integers(1, 8)).map(lambda pair: [pair[0]] * pair[1]),
    st.lists(st.sampled_from([("f4", (3,), "C", n) for n in range(5)]), min_size=1),
)


def leaves_of(arrays):
    return [array_leaf(f"leaf/{n}", array) for n, array in enumerate(arrays)]


@given(MANY)
def test_bytes_of_many_are_those_of_each(drawn):
    leaves = leaves_of([array_of(*one) for one in drawn])
    assert [b"".join([one]) for one in read_leaves(leaves)] == [
        bytes(leaf.buffer.read()) for leaf in leaves
    ]
    expected = b"".join(bytes(leaf.buffer.read()) for leaf in leaves)
    assert b"".join(read_leaves(Leaves(leaves), 1)) == expected[leaves[0].spec.nbytes :]
    memory = bytearray(b"x" * len(expected))
    join_leaves(leaves, memoryview(memory))
    assert memory == expected
    assert find_spans(leaves).tolist() == [list(leaf.buffer.span()) for leaf in leaves]
    with_none = [None, *leaves]
    assert find_spans(with_none).tolist()[0] == [0, 0]


@given(MANY, st.integers(10, 19))
def test_bytes_written_to_many_are_those_written_to_each(drawn, seed):
    source = [
        array_of(dtype, shape, "C", seed + n) for n, (dtype, shape, *_) in enumerate(drawn)
    ]
    together = [array_of(*one).copy(order="K") for one in drawn]
    apart = [array_of(*one).copy(order="K") for one in drawn]
    data = b"".join(bytes(leaf.buffer.read()) for leaf in leaves_of(source))
    write_leaves(leaves_of(together), memoryview(data))
    for leaf, one in zip(leaves_of(apart), leaves_of(source), strict=True):
        leaf.buffer.write(one.buffer.read())
    for first, second, one in zip(together, apart, source, strict=True):
        assert first.tobytes() == second.tobytes()
        assert first.dtype == second.dtype == one.dtype


def test_nan_payloads_and_odd_truth_values_are_written_unchanged():
    patterns = np.array([0x7FA00001, 0xFFC12345, 0x80000000], np.uint32)
    floats = [np.zeros(3, np.float32) for _ in range(4)]
    write_leaves(leaves_of(floats), memoryview(patterns.tobytes() * 4))
    assert all(array.view(np.uint32).tolist() == patterns.tolist() for array in floats)
    memory = bytearray(48)
    join_leaves(leaves_of(floats), memoryview(memory))
    assert memory == patterns.tobytes() * 4
    truths = [np.zeros(2, np.bool_) for _ in range(4)]
    write_leaves(leaves_of(truths), memoryview(b"\x01\x02" * 4))
    assert all(array.view(np.uint8).tolist() == [1, 2] for array in truths)
    join_leaves(leaves_of(truths), memoryview(memory)[:8])
    assert memory[:8] == b"\x01\x02" * 4
    scalars = [np.zeros((), np.float32) for _ in range(3)]
    write_leaves(leaves_of(scalars), memoryview(patterns.tobytes()))
    assert [int(array.view(np.uint32)) for array in scalars] == patterns.tolist()


def test_array_that_cannot_be_written_is_named():
    arrays = [np.zeros(2) for _ in range(3)]
    arrays[1].flags.writeable = False
    with pytest.raises(ValueError, match="read-only") as caught:
        write_leaves(leaves_of(arrays), memoryview(bytes(48)))
    assert "leaf/1" in str(caught.value.__notes__)
    assert find_spans(leaves_of(arrays)).shape == (3, 2)


def test_arrays_that_are_alike_are_read_without_a_step_of_python_for_each(monkeypatch):
    leaves = leaves_of([np.full(4, n, np.float32) for n in range(5)])
    for name in ("read", "view", "write", "span"):
        monkeypatch.setattr(ArrayBuffer, name, lambda *_: 1 / 0)
    assert len(read_leaves(leaves)) == 5
    assert len(find_spans(leaves)) == 5
    write_leaves(leaves, memoryview(bytes(80)))


@given(MANY, st.sampled_from([0, 16, 1 << 20]))
def test_saved_leaves_are_those_of_the_program(tmp_path_factory, drawn, small):
    arrays = {f"leaf/{n}": array_of(*one) for n, one in enumerate(drawn)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shard, "_SMALL_BYTES", small)
        patched.setattr(shard, "_BUCKET_BYTES", max(small, 64))
        shard._plan_forms.cache_clear()
        path = publish(tmp_path_factory.mktemp("saved"), [ArrayState("s", arrays)])
        shard._plan_forms.cache_clear()
    stored = {leaf.spec.name: leaf for leaf in read_manifest(path).state("s").leaves}
    assert stored.keys() == arrays.keys()
    alone = {leaf.spec.name: leaf for leaf in ArrayState("s", arrays).capture().leaves}
    for name, leaf in alone.items():
        assert stored[name].digest == Digest.of(leaf.buffer.read())
        assert stored[name].spec == leaf.spec
    with load(path) as found:
        for name, leaf in alone.items():
            again = array_leaf(name, found["s"][name])
            assert bytes(again.buffer.read()) == bytes(leaf.buffer.read())


@given(MANY)
def test_digests_of_many_are_those_of_each(drawn):
    (content,) = capture_states(
        [ArrayState("s", {f"{n}": array_of(*one) for n, one in enumerate(drawn)})]
    )
    (digested,) = digest_states([content], 1)
    assert list(digested.digests) == [
        Digest.of(leaf.buffer.read()) for leaf in content.leaves
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.update(a=np.ones(3)),
        lambda arrays: arrays.update(a=np.arange(8, dtype=np.int64)),
        lambda arrays: arrays.pop("b"),
        lambda arrays: arrays.update(z=np.zeros(2)),
        lambda arrays: arrays.update(a=arrays["b"], b=arrays["a"]),
        lambda arrays: setattr(arrays["a"], "shape", (2, 4)),
        lambda arrays: setattr(arrays["a"], "dtype", np.int64),
        lambda arrays: arrays.update(b=arrays.pop("a"), a=arrays["b"]),
        lambda arrays: arrays["a"].fill(7),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_state_that_was_looked_at_sees_each_change(change):
    state = ArrayState("s", {"a": np.arange(8.0), "b": np.ones(8)})
    first = state.capture()
    assert state.capture().leaves == first.leaves  # nothing is made anew
    change(state.arrays)
    fresh = ArrayState("s", state.arrays).capture()
    now = state.capture()
    assert [leaf.spec for leaf in now.leaves] == [leaf.spec for leaf in fresh.leaves]
    assert [bytes(leaf.buffer.read()) for leaf in now.leaves] == [
        bytes(leaf.buffer.read()) for leaf in fresh.leaves
    ]
    assert [
        leaf.spec
        for leaf in state.prepare(None, [x.spec for x in now.leaves], strict=True).leaves
    ] == [leaf.spec for leaf in now.leaves]


TENSORS = ["float32", "bfloat16", "bool", "complex64", "int64", "float8_e5m2"]


@given(
    st.lists(
        st.tuples(st.sampled_from(TENSORS), st.sampled_from(SHAPES), st.booleans()),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 3),
    st.booleans(),
)
def test_tensors_are_read_and_written_as_each_alone(drawn, times, is_conjugate):
    torch = pytest.importorskip("torch")
    from mpi_ckpt.states.tensors import tensor_leaf

    def leaves(seed):
        made = []
        for n, (dtype, shape, is_turned) in enumerate(drawn * times):
            kind = getattr(torch, dtype)
            count = int(np.prod(shape, dtype=int)) * kind.itemsize
            data = np.random.default_rng(seed + n).integers(0, 2, count, np.uint8)
            tensor = torch.empty(shape, dtype=kind)
            if count:
                tensor = torch.from_numpy(data).view(kind).reshape(shape)
            tensor = tensor.transpose(0, -1) if is_turned and len(shape) > 1 else tensor
            is_turned_number = kind == torch.complex64 and is_conjugate
            made.append(tensor_leaf(f"{n}", tensor.conj() if is_turned_number else tensor))
        return made

    first, second, source = leaves(0), leaves(0), leaves(50)
    expected = [bytes(leaf.buffer.read()) for leaf in first]
    assert [b"".join([one]) for one in read_leaves(first)] == expected
    data = [bytes(leaf.buffer.read()) for leaf in source]
    write_leaves(first, memoryview(b"".join(data)))
    for leaf, one in zip(second, data, strict=True):
        leaf.buffer.write(memoryview(one))
    assert [bytes(leaf.buffer.read()) for leaf in first] == [
        bytes(leaf.buffer.read()) for leaf in second
    ]
