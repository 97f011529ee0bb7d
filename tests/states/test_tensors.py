# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.states import tensors
from mpi_ckpt.states.buffers.tensor_bytes import TensorBuffer
from mpi_ckpt.states.tensors import empty_tensor, tensor_leaf, tensor_spec

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

DTYPES = sorted(tensors._NAMES, key=str)
SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (2, 3, 4), (1, 1, 1, 5)]
# Quantised, opaque and narrower than a byte: no tensors of them are in the wild.
ODD = re.compile(r"torch\.(q.*|bits.*|u?int[1-7])")


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Make a tensor of random bits: NaN of any payload, -0.0, denormals."""
    size = dtypes.element_bytes(tensors._NAMES[dtype])
    count = int(np.prod(shape, dtype=int)) * size
    if not count:
        return torch.empty(shape, dtype=dtype)
    drawn = np.random.randint(0, 2 if dtype == torch.bool else 256, count, np.uint8)
    return torch.from_numpy(drawn).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's elements in C order, by a way of its own."""
    plain = tensor.resolve_conj().resolve_neg()
    plain = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def round_trip(source: torch.Tensor, target: torch.Tensor) -> None:
    """Carry the bytes of one tensor into another, as a restore does."""
    data = bytes(TensorBuffer(source).read())
    assert data == bits(source)
    staged = bytearray(len(data))
    TensorBuffer(source).copy_to(memoryview(staged))
    assert staged == data
    buffer = TensorBuffer(target)
    view = buffer.view()
    if view is None:
        buffer.write(memoryview(data))
    else:
        view[:] = data
    assert bits(target) == data
    assert bytes(TensorBuffer(target).read()) == data


def test_every_dtype_that_is_plain_bytes_has_a_name():
    there = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert {dtype for dtype in there if not ODD.fullmatch(str(dtype))} == set(DTYPES)
    assert len(set(tensors._NAMES.values())) == len(DTYPES)
    assert all(dtypes.is_known(name) for name in tensors._NAMES.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_every_dtype_and_shape_return(dtype, shape):
    source = random_tensor(dtype, shape)
    spec = tensor_spec("w", source)
    assert spec.shape == shape
    assert spec.nbytes == len(TensorBuffer(source).read())
    target = empty_tensor(spec)
    assert (target.dtype, tuple(target.shape)) == (dtype, shape)
    round_trip(source, target)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 2),
    "strided": lambda t: t[:, ::2],
    "offset": lambda t: t[1:, 1:, 1:],
    "channels_last": lambda t: t.unsqueeze(0).contiguous(memory_format=torch.channels_last),
    "expanded": lambda t: t[:1].expand(1, *t.shape[1:]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if "float4" not in str(d)], ids=str)
def test_bits_return_into_every_layout(dtype, layout):
    source = LAYOUTS[layout](random_tensor(dtype, (3, 4, 6)))
    target = LAYOUTS[layout](random_tensor(dtype, (3, 4, 6)))
    strides = target.stride()
    round_trip(source, target)
    assert target.stride() == strides
    round_trip(random_tensor(dtype, tuple(target.shape)), target)


def test_packed_floats_return_into_a_strided_tensor():
    source, target = (random_tensor(torch.float4_e2m1fn_x2, (4, 6)).t() for _ in range(2))
    round_trip(source, target)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.complex128, torch.complex32], ids=str
)
def test_conjugate_views_give_what_they_show(dtype):
    plain = random_tensor(dtype, (3, 4))
    shown = plain.conj()
    assert TensorBuffer(shown).view() is None
    real, imag = torch.view_as_real(plain).unbind(-1)
    expected = torch.view_as_complex(torch.stack([real, -imag], -1))
    assert bytes(TensorBuffer(shown).read()) == bits(expected)
    target = random_tensor(dtype, (3, 4)).conj()
    round_trip(plain, target)
    round_trip(shown, target)


def test_negative_views_give_what_they_show():
    shown = torch.tensor([1j, 2j, 3j, 4j], dtype=torch.complex64).conj().imag
    assert shown.is_neg()
    assert TensorBuffer(shown).view() is None
    assert np.frombuffer(TensorBuffer(shown).read(), "f4").tolist() == [-1, -2, -3, -4]
    round_trip(torch.tensor([1.0, -0.0, float("inf"), 4.0]), shown)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_pattern_survives_a_strided_copy(dtype):
    every = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(dtype)
    round_trip(every.reshape(256, 256), torch.empty(256, 256, dtype=dtype).t())


@pytest.mark.parametrize(
    ("dtype", "patterns"),
    [
        (torch.float32, [0x7F800001, 0xFFC12345, 1 << 31, 1]),
        (torch.float64, [0x7FF << 52 | 1, 0xFFF8 << 48 | 7, 1 << 63, 1]),
    ],
    ids=str,
)
def test_signalling_nans_and_negative_zeros_survive(dtype, patterns):
    width = torch.empty((), dtype=dtype).element_size()
    raw = np.array(patterns, f"<u{width}")
    source = torch.from_numpy(raw.view(f"i{width}")).view(dtype)
    for target in (torch.zeros(4, dtype=dtype), torch.zeros(8, dtype=dtype)[::2]):
        round_trip(source, target)
        assert bits(target) == raw.tobytes()


def test_view_is_the_live_memory():
    tensor = torch.zeros(4)
    TensorBuffer(tensor).view()[:] = np.ones(4, "f4").tobytes()
    assert tensor.tolist() == [1, 1, 1, 1]


def test_read_of_contiguous_memory_copies_nothing_and_cannot_be_written():
    tensor = torch.zeros(4)
    seen = TensorBuffer(tensor).read()
    assert seen.readonly
    tensor.fill_(1)
    assert bytes(seen) == np.ones(4, "f4").tobytes()


def test_parameters_are_written_in_place_without_a_gradient():
    ones = memoryview(np.ones((3, 2), "f4")).cast("B")
    for start in (torch.zeros(3, 2), torch.zeros(2, 3).t()):
        parameter = torch.nn.Parameter(start)
        tensor_leaf("w", parameter).buffer.write(ones)
        assert parameter.tolist() == [[1, 1]] * 3
        assert parameter.requires_grad
        assert parameter.grad_fn is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.empty(3, dtype=torch.bits8),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quanti")
def test_tensors_that_are_no_bytes_are_refused_by_name(make):
    with pytest.raises(StageError, match=r"'layer\.w'"):
        tensor_leaf("layer.w", make())


def test_dtype_that_torch_lacks_is_a_mismatch():
    with pytest.raises(StateMismatchError, match="no such dtype"):
        empty_tensor(LeafSpec("w", "numpy:<f16", (2,)))


def test_changes_that_torch_does_not_count_are_why_digests_are_never_spared():
    tensor = torch.zeros(4)
    before = TensorBuffer(tensor).stamp()
    tensor.data.add_(1)
    tensor.numpy()[:] += 1  # as MPI does when it reduces into a tensor's memory
    assert TensorBuffer(tensor).stamp() == before
    assert tensor.tolist() == [2] * 4
