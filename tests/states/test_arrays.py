# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.states.arrays import ArrayBuffer, ArrayState, array_dtype_name, empty_array
from mpi_ckpt.states.nested import ObjectState
from tests.making import carry
from tests.values import values_of

DTYPES = [
    *("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "g"),
    *("c8", "c16", "G", "S3", "U4", "M8[ns]", "M8[D]", "m8[25s]"),
]


def random_array(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Make an array of random bits: NaN of any payload, -0.0, NaT."""
    kind = np.dtype(dtype)
    if kind.kind in "SU":
        return np.random.choice(["", "a", "bc", "xyz"], shape).astype(kind)
    count = int(np.prod(shape, dtype=int)) * kind.itemsize
    raw = np.random.randint(0, 2 if kind.kind == "b" else 256, count, np.uint8)
    return raw.view(kind).reshape(shape) if count else np.empty(shape, kind)


def little(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), order="C").tobytes()


def round_trip(source: np.ndarray, target: np.ndarray) -> None:
    data = bytes(ArrayBuffer(source).read())
    staged = bytearray(len(data))
    ArrayBuffer(source).copy_to(memoryview(staged))
    assert staged == data
    buffer = ArrayBuffer(target)
    view = buffer.view()
    if view is None:
        buffer.write(memoryview(data))
    else:
        view[:] = data
    assert bytes(ArrayBuffer(target).read()) == data
    if source.dtype.kind not in "gGfc":  # astype may quieten a NaN
        assert data == little(source)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_dtype_and_shape_return(dtype, shape):
    source = random_array(dtype, shape)
    spec = LeafSpec("a", array_dtype_name(source.dtype), shape)
    target = empty_array(spec)
    assert target.dtype == source.dtype
    assert target.shape == shape
    assert spec.nbytes == source.nbytes == len(ArrayBuffer(source).read())
    round_trip(source, target)
    assert values_of(target) == values_of(source)


LAYOUTS = {
    "transposed": lambda a: a.T,
    "fortran": np.asfortranarray,
    "strided": lambda a: a[:, ::2],
    "reversed": lambda a: a[::-1, ::-1],
    "big_endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "big_endian_strided": lambda a: a.astype(a.dtype.newbyteorder(">"))[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", ["?", "i2", "u8", "f2", "f4", "f8", "c16", "U4", "M8[ns]"]
)
def test_bits_return_into_every_layout(dtype, layout):
    source, target = (LAYOUTS[layout](random_array(dtype, (4, 6, 2))) for _ in range(2))
    strides, kind = target.strides, target.dtype
    round_trip(source, target)
    assert (target.strides, target.dtype) == (strides, kind)
    round_trip(random_array(dtype, source.shape), target)


def test_byte_order_is_not_part_of_the_dtype():
    for order in "<>=":
        assert array_dtype_name(np.dtype(f"{order}f8")) == "F64"
        assert array_dtype_name(np.dtype(f"{order}M8[s]")) == "numpy:<M8[s]"


@given(
    hnp.arrays(
        st.sampled_from(["f4", ">f4", "f8", ">f8", "f2", "c8"]).map(np.dtype),
        hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
    )
)
def test_values_return_into_an_array_of_either_byte_order(source):
    target = np.zeros_like(source)
    round_trip(source, target)
    assert np.array_equal(target, source, equal_nan=True)
    assert np.array_equal(np.signbit(target.real), np.signbit(source.real))


def test_view_is_live_memory_only_where_it_can_be_written():
    array = np.zeros(4)
    ArrayBuffer(array).view()[:] = np.ones(4).tobytes()
    assert array.tolist() == [1, 1, 1, 1]
    array.setflags(write=False)
    assert ArrayBuffer(array).view() is None
    assert ArrayBuffer(array.astype(">f8")).view() is None
    assert ArrayBuffer(np.zeros((4, 4))[:, 1]).view() is None


def test_read_of_contiguous_memory_copies_nothing_and_cannot_be_written():
    array = np.zeros(4)
    seen = ArrayBuffer(array).read()
    assert seen.readonly
    array[:] = 1
    assert bytes(seen) == array.tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.array([None, {}], object),
        np.zeros(2, [("a", "f4"), ("b", object)]),
        np.array(["x"], np.dtypes.StringDType()),
        np.ma.masked_array([1.0, 2.0], [False, True]),
    ],
    ids=lambda a: str(a.dtype),
)
def test_arrays_that_are_more_than_bytes_are_refused(array):
    with pytest.raises(StageError, match=r"cannot be saved|would be lost"):
        ArrayState("a", {"x": array}).capture()


def test_dtype_that_numpy_lacks_is_a_mismatch():
    for name in ("numpy:<f6", "numpy:<m8[parsecs]"):
        assert dtypes.is_known(name) or "light" in name
        with pytest.raises(StateMismatchError, match="no such dtype"):
            empty_array(LeafSpec("a", name, (2,)))


def test_arrays_are_restored_in_place():
    live = {"w": np.zeros((2, 3)), "b": np.zeros((4, 4), "i4")[:, ::2]}
    state = ArrayState("a", live)
    carry(ArrayState("a", {"w": np.ones((2, 3)), "b": np.full((4, 2), 7, "i4")}), state)
    assert (live["w"] == 1).all()
    assert (live["b"] == 7).all()
    assert state.arrays["w"] is live["w"]


def test_arrays_may_come_in_another_order():
    state = ArrayState("a", {"y": np.zeros(2), "x": np.zeros(2)})
    carry(ArrayState("a", {"x": np.ones(2), "y": np.full(2, 2.0)}), state)
    assert state.arrays["x"].tolist() == [1, 1]
    assert state.arrays["y"].tolist() == [2, 2]


def test_replaced_arrays_are_saved_and_restored():
    state = ArrayState("a", {"x": np.zeros(2)})
    state.arrays["x"] = np.full(2, 5.0)
    stream = io.BytesIO()
    state.save(stream)
    state.arrays["x"] = np.zeros(2)
    stream.seek(0)
    state.load(stream)
    assert state.arrays["x"].tolist() == [5, 5]


def test_scalars_in_place_of_arrays_are_restored_too():
    # 0-d arithmetic turns an array into one: state.arrays["n"] = state.arrays["n"] + 1
    state = ArrayState("a", {"n": np.array(1.0) + 1, "m": 3})
    stream = io.BytesIO()
    state.save(stream)
    state.arrays.update(n=np.float64(9), m=9)
    stream.seek(0)
    state.load(stream)
    assert (state.arrays["n"], state.arrays["m"]) == (2, 3)


def test_scalars_that_a_function_returns_are_refused_with_the_ways_out():
    state = ArrayState("a", lambda: {"x": np.zeros(2), "n": 3})
    with pytest.raises(StageError, match=r"n is a scalar.*Return an array.*ObjectState"):
        state.capture()


def test_caller_keeps_a_dictionary_of_its_own():
    given = {"x": np.zeros(1)}
    state = ArrayState("a", given)
    given["y"] = np.zeros(1)
    assert list(state.arrays) == ["x"]


def test_all_mismatches_are_told_at_once_and_nothing_is_changed():
    live = {
        "same": np.zeros(2),
        "shape": np.zeros(3),
        "dtype": np.zeros(2),
        "new": np.zeros(1),
    }
    saved = {
        "same": np.ones(2),
        "shape": np.ones(2),
        "dtype": np.ones(2, "f4"),
        "old": np.ones(1),
    }
    with pytest.raises(StateMismatchError) as caught:
        carry(ArrayState("a", saved), ArrayState("a", live))
    assert len(caught.value.problems) == 4
    for name in ("shape", "dtype", "new", "old"):
        assert any(f"a: {name} " in problem for problem in caught.value.problems)
    assert not any(array.any() for array in live.values())


def test_read_only_arrays_are_a_mismatch_before_anything_moves():
    frozen = np.broadcast_to(np.zeros(1), (3,))
    state = ArrayState("a", {"x": np.zeros(3), "frozen": frozen})
    with pytest.raises(StateMismatchError, match="frozen is read-only"):
        carry(ArrayState("a", {"x": np.ones(3), "frozen": np.ones(3)}), state)
    assert not state.arrays["x"].any()


def test_values_of_an_object_that_no_array_holds_are_a_mismatch():
    """The program took an ObjectState, and takes an ArrayState now."""
    live = np.zeros(3)
    state = ArrayState("s", {"a": live, "in/b": np.zeros(3)})
    saved = {"a": np.ones(3), "in": {"b": np.ones(3)}}
    more = ObjectState("s", {**saved, "step": 5, "names": ["x"]})
    with pytest.raises(StateMismatchError) as caught:
        carry(more, state)
    for place in ("step", "names/0"):
        assert any(f"{place} is saved, and is no array" in p for p in caught.value.problems)
    assert not live.any()
    captured = more.capture()
    arrival = state.prepare(captured.structure, captured.whole_specs, strict=False)
    assert arrival.unexpected == ("step", "names/0")
    carry(ObjectState("s", saved), state)
    assert live.all()


def stretched(value):
    return np.lib.stride_tricks.as_strided(np.full(1, value), (3,), (0,))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("replaced", [True, False])
def test_arrays_that_became_unfit_are_a_mismatch_before_anything_moves(replaced, known):
    arrays = {"a": np.zeros(3), "b": np.zeros(3)}
    state = ArrayState("s", arrays) if known else ArrayState("s", lambda: arrays)
    state.form_of(state.capture().whole_specs)
    if replaced:
        arrays["b"] = stretched(0.0)
        state.arrays["b"] = arrays["b"]
    else:
        arrays["b"].flags.writeable = False
    with pytest.raises(StateMismatchError, match=r"b overlaps itself|b is read-only"):
        carry(ArrayState("s", {"a": np.ones(3), "b": np.arange(3.0)}), state)
    assert not arrays["a"].any()


@pytest.mark.parametrize("order", "<>")
def test_all_bits_of_a_long_double_return_in_either_byte_order(order):
    values = np.array([1, 2, 3], np.longdouble) / 7
    source = values.astype(values.dtype.newbyteorder(order))
    record = np.zeros(3, [("x", source.dtype)])
    record["x"] = source
    for array in (source, record):
        spec = LeafSpec("a", array_dtype_name(array.dtype), array.shape)
        target = empty_array(spec)
        target.view(np.uint8)[...] = 0xFF
        ArrayBuffer(target).write(ArrayBuffer(array).read())
        assert np.array_equal(target["x"] if target.dtype.names else target, values)


def test_every_array_that_is_no_bytes_is_named():
    arrays = {"ids": np.arange(3), "a": np.array([None]), "b": np.array([None])}
    with pytest.raises(StageError) as caught:
        ArrayState("s", arrays).capture()
    assert [text.partition(":")[0] for text in caught.value.problems] == ["a", "b"]


def test_the_same_arrays_have_the_same_capture_until_one_changes():
    arrays = {name: np.zeros(4) for name in ("a", "b")}
    state = ArrayState("s", arrays)
    state.capture()
    first = state.capture()
    arrays["a"][:] = 3  # a value: a leaf refers to it
    assert state.capture() is first
    assert bytes(first.leaves[0].buffer.read()) == np.full(4, 3.0).tobytes()
    state.arrays["b"] = np.ones(4)
    second = state.capture()
    assert second is not first
    assert bytes(second.leaves[1].buffer.read()) == np.ones(4).tobytes()
    state.arrays["b"].shape = (2, 2)
    assert state.capture().whole_specs[1].shape == (2, 2)
