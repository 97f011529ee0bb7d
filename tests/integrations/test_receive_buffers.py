# SPDX-License-Identifier: Apache-2.0
"""Memory of received objects: nobody else's while it is used, and used again after that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpi_ckpt.integrations.horovod import receive_buffers
from mpi_ckpt.integrations.horovod.packing import pack, unpack
from mpi_ckpt.integrations.horovod.receive_buffers import allocate_buffers

LARGE = 20 << 20


@pytest.fixture(autouse=True)
def nothing_kept():
    receive_buffers._kept.clear()
    yield
    receive_buffers._kept.clear()


def address(memory):
    return np.frombuffer(memory, np.uint8).__array_interface__["data"][0]


def received(value):
    """Return an object as another rank would have it."""
    packed = pack(value)
    space = allocate_buffers(packed.lengths)
    for target, source in zip(space, packed.buffers, strict=True):
        target[:] = source
    return unpack(packed.pickled, space)


@pytest.mark.parametrize("lengths", [[], [0], [1, 0, 63, 64, 65], [LARGE, 3, LARGE, 0, 5]])
def test_every_buffer_has_its_length_and_lies_apart(lengths):
    space = allocate_buffers(lengths)
    assert [len(buffer) for buffer in space] == lengths
    for number, buffer in enumerate(space):
        buffer[:] = bytes([number]) * len(buffer)
    for number, buffer in enumerate(space):
        assert bytes(buffer[:1]) == bytes([number])[: len(buffer)]
        assert bytes(buffer[-1:]) == bytes([number])[: len(buffer)]
        assert len(buffer) == 0 or address(buffer) % 16 == 0


def test_what_is_in_use_is_not_given_out_again():
    first = received({"a": np.ones(LARGE // 8), "b": torch.ones(LARGE // 4)})
    part = first["b"][5:7]
    del first["b"]
    second = received({"a": np.zeros(LARGE // 8), "b": torch.zeros(LARGE // 4)})
    assert first["a"].all()
    assert part.tolist() == [1.0, 1.0]
    assert not second["a"].any()


def test_what_is_gone_is_used_again():
    first = received(np.ones(LARGE // 8))
    where = address(first)
    view = first[3:]
    del first
    assert receive_buffers._kept == []
    del view
    assert [arena.nbytes for arena in receive_buffers._kept] == [LARGE]
    assert address(received(np.ones(LARGE // 8))) == where


def test_memory_of_another_size_is_left_where_it_is():
    del_me = allocate_buffers([LARGE])
    del del_me
    small, large = allocate_buffers([LARGE // 3]), allocate_buffers([3 * LARGE])
    assert len(receive_buffers._kept) == 1
    fitting = allocate_buffers([LARGE - 100])
    assert len(fitting[0]) == LARGE - 100
    assert receive_buffers._kept == []
    del small, large


def test_no_more_is_kept_than_a_limit(monkeypatch):
    monkeypatch.setattr(receive_buffers, "_KEPT_BYTES_MAX", 2 * LARGE)
    space = allocate_buffers([LARGE] * 5)
    del space
    assert [arena.nbytes for arena in receive_buffers._kept] == [LARGE] * 2


def test_small_objects_keep_nothing():
    small = received([np.ones(3), torch.ones(4)])
    del small
    assert receive_buffers._kept == []


def test_a_tensor_that_is_more_than_its_memory_goes_as_torch_has_it():
    odd = torch.ones(3)
    odd.note = "kept"
    rooted = torch.ones(3, requires_grad=True)
    found = received([odd, rooted, torch.ones(2, dtype=torch.complex64).conj()])
    assert found[0].note == "kept"
    assert found[1].requires_grad
    assert found[2].is_conj()
