# SPDX-License-Identifier: Apache-2.0
"""What a `Memory` is by itself."""

import pytest

from mpi_ckpt.elastic import Memory
from mpi_ckpt.errors import OptionsError
from mpi_ckpt.memory import Held


def test_holders_are_root_or_all():
    assert Memory().holders == "all"
    assert Memory("root").holders == "root"
    with pytest.raises(OptionsError, match="root or all"):
        Memory("some")


@pytest.mark.parametrize("every", [0, -3])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(OptionsError, match="at least 1 step"):
        Memory(every=every)


def test_it_is_due_at_every_so_many_steps():
    assert [step for step in range(1, 10) if Memory(every=4).is_due(step)] == [4, 8]
    assert not any(Memory().is_due(step) for step in range(10))


def test_it_forgets():
    memory = Memory()
    assert memory.step is None
    memory.held = Held(3, b"{}", ())
    assert memory.step == 3
    memory.clear()
    assert memory.step is None
