# SPDX-License-Identifier: Apache-2.0
"""Many small leaves, made equal, saved and restored at once, are what each is alone."""

from __future__ import annotations

import numpy as np
import pytest

from mpi_ckpt import ArrayState
from mpi_ckpt.engine.sync import sending
from mpi_ckpt.errors import StageError
from mpi_ckpt.states.buffers.array_bytes import ArrayBuffer
from tests.ranks import assert_same, manager, same_error

KINDS = ["f4", "f8", "i2", "?", ">f4", "c8", "u1"]
SHAPES = [(), (0,), (3,), (2, 5), (1, 1, 7), (700,)]


def make_arrays(rank: int, *, alike: bool = False) -> dict[str, np.ndarray]:
    """Return arrays of many dtypes, shapes and layouts, other values on each rank."""
    random = np.random.default_rng(rank)
    arrays = {}
    for number in range(120):
        dtype = "f4" if alike else KINDS[number % len(KINDS)]
        shape = (64,) if alike else SHAPES[number % len(SHAPES)]
        array = random.integers(0, 2, shape).astype(dtype)
        if number % 4 == 1 and array.ndim:
            array = np.asfortranarray(array)
        if number % 4 == 2 and array.ndim:
            wide = np.zeros((*shape[:-1], 2 * shape[-1]), dtype)
            wide[..., ::2] = array
            array = wide[..., ::2]
        arrays[f"leaf/{number:03d}"] = array
    return arrays


def bytes_of(arrays: dict[str, np.ndarray]) -> list[bytes]:
    return [array.tobytes() for array in arrays.values()]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("bucket_bytes", [512, 2 << 20])
def test_all_ranks_have_roots_leaves(comm, shared_path, monkeypatch, alike, bucket_bytes):
    monkeypatch.setattr(sending, "_SMALL_BYTES", 512)
    monkeypatch.setattr(sending, "_BUCKET_BYTES", bucket_bytes)
    arrays, roots = make_arrays(comm.rank, alike=alike), make_arrays(0, alike=alike)
    with manager(shared_path, ArrayState("small", arrays, sync="root")) as checkpoints:
        report = checkpoints.sync()
        assert bytes_of(arrays) == bytes_of(roots)
        assert checkpoints.sync().differing == {}
        checkpoints.save()
        for array in arrays.values():
            array[...] = 0
        checkpoints.restore()
    assert bytes_of(arrays) == bytes_of(roots)
    assert_same(comm, report)


def test_only_some_of_many_differ(comm, shared_path):
    arrays = make_arrays(0)
    places = {name: array.ctypes.data for name, array in arrays.items()}
    if comm.rank == comm.size - 1:
        arrays["leaf/002"][0] += 1
        arrays["leaf/117"][...] = 5
    with manager(shared_path, ArrayState("small", arrays, sync="root")) as checkpoints:
        report = checkpoints.save().sync
    if comm.size > 1:
        assert report.differing == {"small": ("leaf/002", "leaf/117")}
        assert bytes_of(arrays) == bytes_of(make_arrays(0))
    assert places == {name: array.ctypes.data for name, array in arrays.items()}


@pytest.mark.parametrize("bucket_bytes", [512, 2 << 20])
def test_means_of_many_are_the_means_of_each(comm, shared_path, monkeypatch, bucket_bytes):
    monkeypatch.setattr(sending, "_SMALL_BYTES", 512)
    monkeypatch.setattr(sending, "_BUCKET_BYTES", bucket_bytes)
    kinds = ["f4", "f8", "f2", "c8", "i4"]
    arrays = {
        f"x{n}": np.arange(n % 9, dtype=kinds[n % 5])
        + kinds[n % 5].startswith(("f", "c")) * comm.rank
        for n in range(150)
    }
    arrays = {
        name: array.astype(kinds[n % 5]) for n, (name, array) in enumerate(arrays.items())
    }
    with manager(shared_path, ArrayState("small", arrays, sync="mean")) as checkpoints:
        checkpoints.sync()
    for n, (name, array) in enumerate(arrays.items()):
        shift = 0 if kinds[n % 5] == "i4" else (comm.size - 1) / 2
        expected = np.arange(n % 9) + shift
        np.testing.assert_allclose(array, expected, rtol=1e-3, err_msg=name)
    assert_same(comm, b"".join(bytes_of(arrays)))


def test_leaf_that_cannot_be_written_is_an_error_on_all_ranks(
    comm, shared_path, monkeypatch
):
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    arrays = make_arrays(comm.rank, alike=True)
    with manager(shared_path, ArrayState("small", arrays, sync="root")) as checkpoints:
        with monkeypatch.context() as patched:
            if comm.rank == comm.size - 1:
                patched.setattr(ArrayBuffer, "write_all", lambda *_: 1 / 0)
            with same_error(comm, StageError, f"rank {comm.size - 1}", "ZeroDivision"):
                checkpoints.sync()
        checkpoints.sync()
    assert bytes_of(arrays) == bytes_of(make_arrays(0, alike=True))
