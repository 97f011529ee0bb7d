# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.leaves.leaf import LeafSpec, MemoryBuffer, copy_bytes


def test_spec_knows_its_size_and_shows_itself():
    spec = LeafSpec("w", "F32", (2, 3))
    assert spec.nbytes == 24
    assert str(spec) == "w F32[2, 3]"
    assert LeafSpec("s", "C128", ()).nbytes == 16


def test_view_read_and_write_are_of_the_same_bytes():
    buffer = MemoryBuffer.empty(3)
    assert bytes(buffer.read()) == bytes(3)
    buffer.write(memoryview(b"xyz"))
    buffer.view()[0:1] = b"a"
    assert bytes(buffer.read()) == b"ayz"
    target = bytearray(3)
    buffer.copy_to(memoryview(target))
    assert target == b"ayz"


def test_memory_that_cannot_be_written_has_no_view():
    buffer = MemoryBuffer(b"abc")
    assert buffer.view() is None
    assert bytes(buffer.read()) == b"abc"
    with pytest.raises(TypeError, match="read-only"):
        buffer.write(memoryview(b"xyz"))


def test_nothing_is_copied_and_written_without_trouble():
    buffer = MemoryBuffer.empty(0)
    buffer.write(memoryview(b""))
    buffer.copy_to(memoryview(bytearray()))
    copy_bytes(memoryview(b""), memoryview(bytearray()))
