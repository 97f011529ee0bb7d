# SPDX-License-Identifier: Apache-2.0
"""What may only be read is told at the first save, and never written to."""

from __future__ import annotations

import mmap
import warnings

import numpy as np
import pytest
import torch

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.states.buffers.array_bytes import ReadonlyMemory
from mpi_ckpt.states.module import ModuleState
from mpi_ckpt.states.nested import ObjectState


@pytest.fixture
def mapped():
    """A tensor over memory that was mapped to be read, as programs share large tables."""
    array = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ), "f8", 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it has no such mark
        return torch.from_numpy(array)


def test_the_kernel_tells_which_memory_it_is(mapped):
    memory = ReadonlyMemory()
    assert mapped.data_ptr() in memory
    assert torch.ones(3).data_ptr() not in memory
    assert np.ones(mmap.PAGESIZE).ctypes.data not in memory
    assert 0 not in memory
    assert (1 << 63) not in memory


class Holder(torch.nn.Module):
    def __init__(self, table) -> None:
        super().__init__()
        self.register_buffer("table", table)


def test_a_module_with_such_a_buffer_is_refused_at_its_first_save(mapped):
    with pytest.raises(StageError, match="table lies in memory that may only be read"):
        ModuleState("m", Holder(mapped)).capture()


def test_one_that_came_later_is_refused_before_a_byte_moves(mapped):
    holder = Holder(mapped.clone())
    state = ModuleState("m", holder)
    saved = state.capture()
    holder.table = mapped
    with pytest.raises(StateMismatchError, match="table lies in memory that may only be"):
        state.prepare(saved.structure, [leaf.spec for leaf in saved.leaves], strict=True)


def test_a_nested_value_gets_memory_of_its_own(mapped):
    state = ObjectState("o", {"table": mapped})
    saved = state.capture()
    arrival = state.prepare(
        saved.structure, [leaf.spec for leaf in saved.leaves], strict=True
    )
    (target,) = arrival.leaves
    assert target is not None
    target.buffer.write(np.ones(6).data.cast("B"))
    arrival.adopt()
    assert state.value["table"].tolist() == [1] * 6
    assert mapped.tolist() == [0] * 6
