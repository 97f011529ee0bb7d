# SPDX-License-Identifier: Apache-2.0
"""Every element type of NumPy and torch, in every way that elements lie in memory.

As values, which are made anew, and in place: in arrays and buffers that are there.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

from mpi_ckpt import ArrayState, ModuleState, ObjectState
from tests.conformance.subjects import SAVED, Case, Kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_RECORD = np.dtype([("a", "i1"), ("b", "<f8"), ("c", ">i4", (2,)), ("d", "U3")])
_OF_MACHINE_LEARNING = sorted(
    name for name, value in vars(ml_dtypes).items() if isinstance(value, type)
)
NUMPY: dict[str, np.dtype] = {
    **{
        np.dtype(char).name: np.dtype(char)
        for char in "?bBhHiIlLqQefdgFDGO"  # of numpy.typecodes: those of one size
    },
    **{
        text: np.dtype(text)
        for text in ("S5", "U5", "S0", "U0", "V5", "V0", "M8", "M8[D]", "M8[ns]")
    },
    **{text: np.dtype(text) for text in ("m8", "m8[25s]", "m8[Y]")},
    "record": _RECORD,
    "aligned record": np.dtype([("a", "i1"), ("b", "f8")], align=True),
    "record in a record": np.dtype([("x", _RECORD), ("y", "c16")]),
    "titled record": np.dtype([(("a title", "a"), "f4")]),
    "record of objects": np.dtype([("a", "O")]),
    "empty record": np.dtype([]),
    "record of numpy.record": np.dtype((np.record, [("a", "<i4")])),
    "record of swapped long doubles": np.dtype([("a", ">g"), ("b", ">G")]),
    "float64 with metadata": np.dtype("f8", metadata={"unit": "m"}),
    **{
        f"ml_dtypes.{n}": np.dtype(getattr(ml_dtypes, n))
        for n in _OF_MACHINE_LEARNING
        if n not in ("finfo", "iinfo")
    },
}
if hasattr(np.dtypes, "StringDType"):
    NUMPY["StringDType"] = np.dtypes.StringDType()

TORCH: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


def numbers(dtype: np.dtype, shape: tuple[int, ...], seed: int) -> Any:
    """Return an array in C order, with elements that a seed tells apart."""
    count = math.prod(shape)
    if dtype.names is not None:
        record = np.zeros(shape, dtype)
        for name in dtype.names:
            inner = dtype[name].subdtype or (dtype[name], ())
            record[name] = numbers(inner[0], (*shape, *inner[1]), seed)
        return record
    if dtype.kind == "V" and dtype.type is np.void:
        data = bytes((seed + n) % 256 for n in range(count * dtype.itemsize))
        return (
            np.frombuffer(bytearray(data), dtype).reshape(shape)
            if data
            else np.empty(shape, dtype)
        )
    plain = (np.arange(count) + seed) % 2 if dtype.kind == "V" else np.arange(count) + seed
    if dtype.kind in "mM":
        plain = plain.view("i8").view(dtype)
    elif dtype.kind in "fcV" and dtype.itemsize > 1:
        plain = plain / 3
    return plain.astype(dtype).reshape(shape)


def swapped(array: Any) -> Any:
    """Return the same values in the other byte order."""
    return array.astype(array.dtype.newbyteorder())


def frozen(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


ARRAYS: dict[str, Callable[[np.dtype, int], Any]] = {
    "C": lambda d, s: numbers(d, (2, 3, 4), s).copy(),
    "Fortran": lambda d, s: np.asfortranarray(numbers(d, (2, 3, 4), s)),
    "permuted": lambda d, s: numbers(d, (2, 3, 4), s).copy().transpose(1, 2, 0),
    "strided": lambda d, s: numbers(d, (3, 8), s).copy()[:, ::2],
    "negative stride": lambda d, s: numbers(d, (3, 4), s).copy()[::-1],
    "0-d": lambda d, s: numbers(d, (), s).copy(),
    "empty": lambda d, s: numbers(d, (0, 3), s).copy(),
    "scalar": lambda d, s: numbers(d, (1,), s)[0],
    "other byte order": lambda d, s: swapped(numbers(d, (2, 3), s)),
    "other byte order in Fortran order": lambda d, s: swapped(numbers(d, (2, 3), s)).copy(
        "F"
    ),
    "read-only": lambda d, s: frozen(numbers(d, (2, 3), s)),
    "broadcast": lambda d, s: np.broadcast_to(numbers(d, (3,), s), (2, 3)),
    "windows": lambda d, s: np.lib.stride_tricks.sliding_window_view(
        numbers(d, (4,), s), 2, writeable=True
    ),
}


def elements(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a tensor in C order, with elements that a seed tells apart."""
    if dtype in QUANTIZED:
        return torch.quantize_per_tensor(torch.ones(shape) * seed, 0.1, 0, dtype)
    data = (torch.arange(math.prod(shape) * dtype.itemsize) + seed) % 100
    data = data % 2 if dtype == torch.bool else data
    return data.to(torch.uint8).view(dtype).reshape(shape)


QUANTIZED = [value for name, value in TORCH.items() if name.startswith("q")]
TENSORS: dict[str, Callable[[torch.dtype, int], torch.Tensor]] = {
    "C": lambda d, s: elements(d, (2, 3, 4), s),
    "permuted": lambda d, s: elements(d, (2, 3, 4), s).permute(1, 2, 0),
    "channels last": lambda d, s: elements(d, (2, 5, 5, 3), s).permute(0, 3, 1, 2),
    "strided": lambda d, s: elements(d, (3, 8), s)[:, ::2],
    "0-d": lambda d, s: elements(d, (), s),
    "empty": lambda d, s: elements(d, (0, 3), s),
    "expanded": lambda d, s: elements(d, (3,), s).expand(2, 3),
    "windows": lambda d, s: elements(d, (4,), s).unfold(0, 2, 1),
}


def per_channel(seed: int) -> torch.Tensor:
    scales, zeros = torch.tensor([0.1, 0.2]), torch.zeros(2)
    given = torch.ones(2, 2) * seed
    return torch.quantize_per_channel(given, scales, zeros, 0, torch.qint8)


KINDS: dict[str, Callable[[int], torch.Tensor]] = {
    "sparse COO": lambda s: (torch.eye(4) * s).to_sparse(),
    "sparse CSR": lambda s: (torch.eye(4) * s).to_sparse_csr(),
    "sparse CSC": lambda s: (torch.eye(4) * s).to_sparse_csc(),
    "sparse BSR": lambda s: (torch.eye(4) * s).to_sparse_bsr((2, 2)),
    "sparse BSC": lambda s: (torch.eye(4) * s).to_sparse_bsc((2, 2)),
    "nested": lambda s: torch.nested.nested_tensor([torch.ones(s), torch.ones(3)]),
    "jagged nested": lambda s: torch.nested.nested_tensor(
        [torch.ones(s), torch.ones(3)], layout=torch.jagged
    ),
    "mkldnn": lambda s: (torch.ones(3) * s).to_mkldnn(),
    "meta": lambda s: torch.ones(3, device="meta"),
    "quantized per channel": per_channel,
    "conjugate view": lambda s: (torch.ones(3, dtype=torch.complex64) * (s + 1j)).conj(),
    "negative view": lambda s: (torch.ones(3, dtype=torch.complex64) * s * 1j).conj().imag,
    "requires_grad": lambda s: (torch.ones(3) * s).requires_grad_(),
    "parameter": lambda s: torch.nn.Parameter(torch.ones(3) * s),
    "frozen parameter": lambda s: torch.nn.Parameter(torch.ones(3) * s, False),
    "buffer": lambda s: torch.nn.Buffer(torch.ones(3) * s),
    "without a shape yet": lambda s: torch.nn.UninitializedParameter(),
    "made in inference mode": lambda s: of_inference(s),
    "result with a graph": lambda s: torch.ones(3, requires_grad=True) * s,
    "subclass": lambda s: (torch.ones(3) * s).as_subclass(Marked),
}


class Marked(torch.Tensor):
    pass


def of_inference(seed: int) -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3) * seed


def of_value(make: Callable[[int], Any], seed: int) -> Kept:
    """Keep a value in an ObjectState; the fresh one has nothing yet."""
    value = {"x": make_quietly(make, seed)} if seed == SAVED else None
    return Kept(value, ObjectState, without_graph)


def without_graph(held: Any) -> Any:
    """Return the value that is held, results of operations as mere numbers."""
    value = getattr(held, "value", held)
    x = value["x"] if value else None
    return x.detach() if getattr(x, "grad_fn", None) is not None else x


def in_array(make: Callable[[int], Any], seed: int) -> Kept:
    """Keep an array in an ArrayState, which restores it in place."""
    arrays = {"x": make_quietly(make, seed)}
    return Kept(arrays, ArrayState, lambda held: getattr(held, "arrays", held))


def in_buffer(make: Callable[[int], Any], seed: int) -> Kept:
    """Keep a tensor as a buffer of a module."""
    module = torch.nn.Module()
    module.register_buffer("x", make_quietly(make, seed))
    # Of its class only the numbers: it stays the tensor that is there.
    return Kept(module, ModuleState, lambda _: module.x.detach().as_subclass(torch.Tensor))


def make_quietly(make: Callable[[int], Any], seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of types that torch means to drop
        return make(seed)


def element_cases() -> Iterator[Case]:
    homes: dict[str, list[tuple[str, Any]]] = {
        "NumPy": [("as values", of_value), ("in place", in_array)],
        "torch": [("as values", of_value), ("in place", in_buffer)],
    }
    for library, what, form, make in kinds_of_elements():
        for home, hold in homes[library]:
            yield Case(f"Elements of {library}, {home}", what, form, partial(hold, make))


def kinds_of_elements() -> Iterator[tuple[str, str, str, Callable[[int], Any]]]:
    """Give all that can be made."""
    drawn: list[tuple[str, str, str, Callable[[int], Any]]] = [
        *(
            ("NumPy", name, form, partial(make, dtype))
            for name, dtype in NUMPY.items()
            for form, make in ARRAYS.items()
        ),
        *(
            ("torch", name, form, partial(make, dtype))
            for name, dtype in TORCH.items()
            for form, make in TENSORS.items()
        ),
        *(("torch", "float32", form, make) for form, make in KINDS.items()),
    ]
    for library, what, form, make in drawn:
        try:
            value = make_quietly(make, SAVED)
        except (TypeError, AttributeError):
            # NumPy's: not every type has another byte order, or windows; or an older torch.
            continue
        # One of objects or texts of any length is no scalar of NumPy's, but Python's.
        if form != "scalar" or isinstance(value, np.generic):
            yield library, what, form, make
