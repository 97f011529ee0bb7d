# SPDX-License-Identifier: Apache-2.0
"""Values as programs keep them, drawn; and what it means that one came back as it was."""

from __future__ import annotations

import math
import struct
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpi_ckpt.states.buffers.array_bytes import holes_of, unnamed_part

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(
    ["~", "leaf", "items", "a", "a/b", "b", "0", "1", "text", "x" * 5000]
)
KEYS = st.one_of(
    TEXT, st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), TEXT)
)
# NaNs of any sign and payload: which one it is may mean something.
NANS = st.integers(1, 2**51 - 1).flatmap(
    lambda n: st.sampled_from([0x7FF8 << 48, 0xFFF8 << 48]).map(
        lambda top: struct.unpack(">d", (top | n).to_bytes(8, "big"))[0]
    )
)
FLOATS = st.floats() | NANS

ML_DTYPES = [
    np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu")
]
PLAIN_DTYPES = st.one_of(
    hnp.scalar_dtypes().filter(lambda dtype: dtype.itemsize),
    hnp.unicode_string_dtypes(max_len=3),
    hnp.byte_string_dtypes(max_len=3),
    st.sampled_from([np.dtype(order + char) for char in "gG" for order in "<>"]),
)
RECORDS = st.one_of(
    hnp.array_dtypes(PLAIN_DTYPES, min_size=1, max_size=3, allow_subarrays=True),
    hnp.nested_dtypes(PLAIN_DTYPES, max_itemsize=200).filter(lambda dtype: dtype.names),
)
UNTITLED_RECORDS = RECORDS.filter(lambda dtype: unnamed_part(dtype) is None)


def of_traits(dtype: np.dtype, bits: int) -> np.dtype:
    """Return a record aligned or not, of `numpy.record` or not, and so at each depth."""
    fields: list[Any] = [
        (
            n,
            of_traits(inner.base, bits >> 2) if inner.base.names else inner.base,
            inner.shape,
        )
        for n, (inner, *_) in (dtype.fields or {}).items()
    ]
    made = np.dtype(fields, align=bool(bits & 1))
    return np.dtype((np.record, made)) if bits & 2 else made


NUMPY_DTYPES = st.one_of(
    PLAIN_DTYPES,
    st.sampled_from(ML_DTYPES),
    UNTITLED_RECORDS,  # titles are refused
    st.builds(of_traits, UNTITLED_RECORDS, st.integers(1, 63)),
)

# All that NumPy makes a tensor's bytes of, and back.
TORCH_DTYPES = [
    getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32"),
        *("bfloat16", "float64", "complex32", "complex64", "complex128"),
        *("float8_e5m2", "float8_e4m3fn", "uint16", "uint32", "uint64"),
    )
    if hasattr(torch, name)
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns once of the first complex half
    torch.zeros(1).to(torch.complex32)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)


@st.composite
def arrays(draw: Any) -> np.ndarray:
    """Draw an array of any dtype, shape, order, stride and class that is taken."""
    dtype, shape = draw(NUMPY_DTYPES), draw(SHAPES)
    count = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype.kind == "b" or dtype.names or dtype.kind in "US":
        data = bytes(count)  # not all bytes are values of these
    array = np.frombuffer(data, dtype).reshape(shape) if count else np.empty(shape, dtype)
    array = array.copy().transpose(draw(st.permutations(range(array.ndim))))
    if draw(st.booleans()) and array.ndim:
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    if dtype.names and draw(st.booleans()):
        of_records = np.dtype((np.record, array.dtype))
        array = array.view(draw(st.sampled_from([np.recarray, of_records])))
    elif array.ndim == 2 and not dtype.names and draw(st.booleans()):
        array = array.view(np.matrix)
    array.flags.writeable = draw(st.booleans())
    return array


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    """Draw a tensor of any dtype, shape, order and stride, or a parameter."""
    dtype, shape = draw(st.sampled_from(TORCH_DTYPES)), draw(SHAPES)
    numbers = torch.arange(math.prod(shape)).reshape(shape) + draw(st.integers(0, 9))
    tensor = numbers.to(dtype)
    if shape:
        tensor = tensor.permute(*draw(st.permutations(range(len(shape)))))
    if draw(st.booleans()) and tensor.dim():
        tensor = torch.stack([tensor.contiguous()] * 2, -1)[..., 0]
    if not (dtype.is_floating_point or dtype.is_complex) or dtype.itemsize == 1:
        return tensor
    if dtype.is_complex and draw(st.booleans()):
        tensor = tensor.conj()
    kind = draw(st.sampled_from(["plain", "grad", "parameter", "frozen"]))
    if kind == "plain":
        return tensor
    if kind == "grad":
        return tensor.requires_grad_()
    return torch.nn.Parameter(tensor, requires_grad=kind == "parameter")


def numbers_lists() -> st.SearchStrategy[Any]:
    """Draw a list of numbers that may be long enough to become an array."""
    scalars = st.sampled_from([0, -5, 2**62, 2**64, 0.5, -0.0, math.nan, True])
    return st.builds(
        lambda item, count, wrap, times: [wrap([item] * count) for _ in range(times)],
        scalars,
        st.integers(0, 300),
        st.sampled_from([list, tuple]),
        st.integers(0, 3),
    )


HASHABLE = st.recursive(
    st.one_of(st.integers(), st.booleans(), TEXT, st.binary(max_size=3), FLOATS),
    lambda inner: st.frozensets(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
FACTORIES = st.sampled_from([None, int, float, list, dict, set, str])
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**200), 2**200),
    FLOATS,
    st.builds(complex, FLOATS, FLOATS),
    st.binary(max_size=5),
    st.integers(4090, 4100).map(lambda n: b"\xff" * n),
    TEXT,
    arrays(),
    tensors(),
    numbers_lists(),
    arrays().filter(lambda a: a.size).map(lambda a: np.asarray(a).reshape(-1)[0]),
    SHAPES.map(torch.Size),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.device("cuda:1")]),
)
VALUES = st.recursive(
    PLAIN | st.sets(HASHABLE, max_size=3) | st.frozensets(HASHABLE, max_size=3),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(0, 4)),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(TEXT, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.dictionaries(TEXT, st.integers(), max_size=3).map(Counter),
        st.builds(defaultdict, FACTORIES, st.dictionaries(KEYS, inner, max_size=3)),
    ),
    max_leaves=12,
)


def alike(value: Any, other: Any) -> bool:
    """Compare values: bits, kind, layout and place; also NaNs, and the sign of zero."""
    if isinstance(value, np.generic) and isinstance(other, np.generic):
        # NumPy has two classes for one type of integers: longlong, and int64 or intc.
        return _arrays_alike(value, other)
    if type(value) is not type(other):
        return False
    if isinstance(value, torch.Tensor):
        return _tensors_alike(value, other)
    if isinstance(value, np.ndarray):
        return _arrays_alike(value, other)
    if isinstance(value, dict):
        return (
            getattr(value, "default_factory", None)
            is getattr(other, "default_factory", None)
            and all(map(alike, value, other))
            and len(value) == len(other)
            and all(map(alike, value.values(), other.values()))
        )
    if isinstance(value, (list, tuple, deque)):
        same_bound = getattr(value, "maxlen", None) == getattr(other, "maxlen", None)
        return same_bound and len(value) == len(other) and all(map(alike, value, other))
    if isinstance(value, (set, frozenset)):
        return sorted(map(canonical, value)) == sorted(map(canonical, other))
    if isinstance(value, float):
        return struct.pack("d", value) == struct.pack("d", other)
    if isinstance(value, complex):
        return alike(value.real, other.real) and alike(value.imag, other.imag)
    return repr(value) == repr(other)


def canonical(item: Any) -> str:
    """Return text that is the same for hashable values that are alike."""
    if isinstance(item, frozenset):
        return f"{{{sorted(map(canonical, item))}}}"
    if isinstance(item, tuple):
        return f"({list(map(canonical, item))})"
    if isinstance(item, float):
        return struct.pack(">d", item).hex()
    return f"{type(item)} {item!r}"


def bits(tensor: torch.Tensor) -> bytes:
    """Return the elements of a tensor in order, as bytes."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    # A clone, as a single element of any stride counts as contiguous.
    flat = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _tensors_alike(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        (tensor.dtype, tensor.shape, tensor.device)
        == (other.dtype, other.shape, other.device)
        and tensor.requires_grad == other.requires_grad
        and bits(tensor) == bits(other)
        and order(tensor.shape, tensor.stride()) == order(other.shape, other.stride())
    )


def _arrays_alike(value: Any, other: Any) -> bool:
    return (
        (value.dtype, traits(value.dtype)) == (other.dtype, traits(other.dtype))
        and value.dtype.byteorder == other.dtype.byteorder
        and value.shape == other.shape
        and values_of(value) == values_of(other)
        and (
            isinstance(value, np.generic) or value.flags.writeable == other.flags.writeable
        )
        and order(value.shape, value.strides) == order(other.shape, other.strides)
    )


def traits(dtype: np.dtype) -> list[Any]:
    """Return what NumPy leaves out where it compares dtypes of records."""
    inner = [traits(field.base) for field, *_ in (dtype.fields or {}).values()]
    return [dtype.isalignedstruct, dtype.type is np.record, inner]


def values_of(array: Any) -> bytes:
    """Return the bytes of an array, without those that belong to no value."""
    if not array.dtype.itemsize:  # an empty text
        return b""
    data = np.frombuffer(array.tobytes(), np.uint8).reshape(-1, array.dtype.itemsize)
    holes = holes_of(array.dtype)
    return (data if holes is None else data[:, ~holes]).tobytes()


def order(shape: Any, strides: Any) -> list[int]:
    """Return the dimensions of more than one element, by how they lie in memory."""
    if 0 in shape:
        return []
    dims = [dim for dim, n in enumerate(shape) if n > 1]
    return sorted(dims, key=lambda dim: -abs(strides[dim]))
