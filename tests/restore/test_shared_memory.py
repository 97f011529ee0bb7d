# SPDX-License-Identifier: Apache-2.0
"""Memory that two processes of a host see."""

import os
import subprocess
import sys

import pytest

from mpi_ckpt.memory import SharedMemory

READS = """
import sys
from mpi_ckpt.memory import SharedMemory
memory = SharedMemory.attach(int(sys.argv[1]), int(sys.argv[2]), 8192)
print(bytes(memory.view[:5]).decode(), memory.view.readonly)
"""


def test_another_process_reads_it():
    memory = SharedMemory.create(8192)
    memory.view[:5] = b"bytes"
    command = [sys.executable, "-c", READS, str(os.getpid()), str(memory.descriptor)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["bytes", "True"]
    memory.close()


def test_it_stays_mapped_after_it_is_closed():
    memory = SharedMemory.create(3 * 4096)
    memory.view[:] = bytes(range(256)) * 48
    seen = SharedMemory.attach(os.getpid(), memory.descriptor, 3 * 4096)
    assert bytes(seen.view) == bytes(memory.view)
    seen.close()
    memory.close()
    memory.close()
    assert seen.view[1] == 1


def test_nothing_is_attached_that_is_not_there():
    memory = SharedMemory.create(4096)
    descriptor = memory.descriptor
    with pytest.raises(ValueError, match="greater"):
        SharedMemory.attach(os.getpid(), descriptor, 8192)
    memory.close()
    with pytest.raises(OSError):  # noqa: PT011
        SharedMemory.attach(os.getpid(), descriptor, 4096)
    with pytest.raises(OSError):  # noqa: PT011
        SharedMemory.attach(2**22 + 1, 0, 4096)


def test_a_system_without_such_memory_says_so(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="without a file"):
        SharedMemory.create(4096)
