# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of bytes on a device: the same as NumPy's, and different for others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.states.buffers import fingerprint
from mpi_ckpt.states.buffers.fingerprint import count_rows, finish, row_sums
from mpi_ckpt.states.buffers.tensor_bytes import flat_bytes

ROW = 64 << 10
GOLDEN = "646f509839f89b0bca82a1c38a2c5d10"
LENGTHS = [
    *(0, 1, 2, 3, 4, 5, 7, 8, 4095, ROW - 1, ROW, ROW + 1, ROW + 4, 2 * ROW, 5 * ROW + 2),
    *((4 << 20) - 3, 4 << 20, (4 << 20) + 1, (4 << 20) + ROW + 5),
]


def drawn(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def of_tensor(tensor):
    """What the package makes."""
    flat = flat_bytes(tensor) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return finish(row_sums([flat]).numpy(), len(flat))


def of_bytes(data):
    return of_tensor(torch.from_numpy(data))


def reference(data):
    """The same in NumPy, word by word, from the description."""
    state = np.arange(1, 4 * 16384 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys = ((state ^ (state >> np.uint64(31))) | np.uint64(1)).reshape(4, 16384)
    sums = b""
    for start in range(0, len(data), ROW):
        row = data[start : start + ROW]
        words = np.append(row, np.zeros(-len(row) % 4, np.uint8)).view("<i4")
        words = words.astype(np.int64).view(np.uint64)
        for lane in range(4):
            total = (words * keys[lane, : len(words)]).sum(dtype=np.uint64)
            sums += int(total).to_bytes(8, "little")
    return digest_bytes(len(data).to_bytes(8, "little") + sums)


@pytest.mark.parametrize("nbytes", LENGTHS)
def test_torch_makes_what_numpy_makes(nbytes):
    data = drawn(nbytes, nbytes)
    assert of_bytes(data) == reference(data)
    assert len(row_sums([torch.from_numpy(data)])) == count_rows(nbytes)


def test_it_stays_the_same_from_release_to_release():
    """It is kept in no file, but ranks that compare theirs may not differ in it."""
    assert of_bytes(np.arange(100_000, dtype=np.uint32).view(np.uint8)).hex() == GOLDEN


def test_no_two_lengths_of_zeros_are_the_same():
    found = {of_bytes(np.zeros(nbytes, np.uint8)) for nbytes in LENGTHS}
    assert len(found) == len(LENGTHS)


def test_each_flipped_bit_changes_it():
    """Of drawn, zero and full bytes; all bits of a short run, some of a long one."""
    for data in (drawn(601), np.zeros(601, np.uint8), np.full(601, 255, np.uint8)):
        found = {of_bytes(data)}
        for at in range(len(data)):
            for bit in range(8):
                data[at] ^= 1 << bit
                found.add(of_bytes(data))
                data[at] ^= 1 << bit
        assert len(found) == 1 + 8 * len(data)
    long = drawn(3 * ROW + 3)
    found = {of_bytes(long)}
    places = [*np.random.default_rng(1).integers(0, len(long), 300), *range(-8, 0)]
    for bit, at in enumerate(places):
        long[at] ^= 1 << bit % 8
        found.add(of_bytes(long))
        long[at] ^= 1 << bit % 8
    assert len(found) > 300


def test_two_flipped_signs_do_not_cancel():
    """Sums modulo 2**64 of products with odd keys lose them in words of 64 bits."""
    words = drawn(4 * 500).view(np.int32)
    found = {of_bytes(words.view(np.uint8))}
    for first in range(0, 499, 7):
        for second in range(first + 1, 500, 13):
            words[[first, second]] ^= np.int32(-(2**31))
            found.add(of_bytes(words.view(np.uint8)))
            words[[first, second]] ^= np.int32(-(2**31))
    pairs = sum(len(range(first + 1, 500, 13)) for first in range(0, 499, 7))
    assert len(found) == 1 + pairs
    values = torch.randn(10_000)
    assert of_tensor(values) != of_tensor(-values)


@pytest.mark.parametrize("block", [4, 8, 256, ROW, 4 << 20])
def test_it_depends_on_the_order_of_blocks(block):
    data = drawn(3 * block)
    first, second, third = np.split(data, 3)
    orders = [(first, second, third), (second, first, third), (third, second, first)]
    orders += [(first, third, second), (second, third, first), (third, first, second)]
    assert len({of_bytes(np.concatenate(order)) for order in orders}) == 6


def test_it_depends_on_the_order_of_elements():
    values = torch.randn(300, 300)
    same = {of_tensor(one.contiguous()) for one in (values, values.flip(0), values.t())}
    assert len(same) == 3


def test_moving_a_value_changes_it():
    found = set()
    for at in range(0, 40_000, 111):
        data = np.zeros(40_000, np.float32)
        data[at] = 1
        found.add(of_bytes(data.view(np.uint8)))
    assert len(found) == len(range(0, 40_000, 111))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.int8,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.complex128,
    ],
)
def test_the_dtype_does_not_matter_but_the_bytes(dtype):
    tensor = torch.ones(70_001).to(dtype)
    data = tensor.view(torch.uint8).numpy()
    assert of_tensor(tensor) == reference(data)


@pytest.mark.parametrize("start", range(9))
def test_it_does_not_depend_on_where_the_bytes_are(start):
    whole = torch.from_numpy(drawn(2 * ROW + 100))
    part = whole[start : start + 2 * ROW + 50]
    assert of_tensor(part) == of_tensor(part.clone())
    short = torch.arange(1000, dtype=torch.int16)[start:]
    assert of_tensor(short) == of_tensor(short.clone())


def test_several_runs_have_the_sums_of_each():
    runs = [torch.from_numpy(drawn(nbytes)) for nbytes in (10, 0, ROW + 1, 3, 5 * ROW)]
    sums, end = row_sums(runs).numpy(), 0
    for run in runs:
        start, end = end, end + count_rows(len(run))
        assert finish(sums[start:end], len(run)) == of_tensor(run)
    assert end == len(sums)


def test_words_without_keys_of_their_own_would_be_seen(monkeypatch):
    """The tests above find a fingerprint that does not depend on the place."""
    alike = torch.from_numpy(fingerprint.make_keys().view(np.int64)[:, :1]).repeat(1, 16384)
    monkeypatch.setattr(fingerprint, "_keys_on", lambda device: alike)
    data = drawn(8)
    assert of_bytes(data) == of_bytes(np.roll(data, 4))
