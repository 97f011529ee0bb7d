# SPDX-License-Identifier: Apache-2.0
"""What a `Memory` is by itself."""

import ctypes
import os
import re
import sys
from pathlib import Path

import pytest

from mpi_ckpt.elastic import Memory
from mpi_ckpt.errors import OptionsError
from mpi_ckpt.memory import Arena, MemoryCopy


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
    memory.copy = MemoryCopy(3, b"{}", {})
    assert memory.step == 3
    memory.clear()
    assert memory.step is None


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux tells of mappings")
def test_an_arena_is_not_for_forked_workers():
    memory = Arena().take(8 << 20)
    memory[0] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    flags = ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert " dc" in flags


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_worker_leaves_the_arena_alone():
    arena = Arena()
    memory = arena.take(8 << 20)
    memory[:4] = b"kept"
    child = os.fork()
    if child == 0:
        arena.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(memory[:4]) == b"kept"
