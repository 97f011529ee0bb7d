# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring hold no second copy of what is saved."""

import numpy as np
import pytest

from benchmarks.peak import PeakMemory
from mpi_ckpt import ArrayState
from tests.ranks import manager

MIB = 1 << 20
LEAVES = 3  # of 64 MiB: a copy of all of them is above either bound
ROOT_BYTES_MAX = 128 * MIB
OTHERS_BYTES_MAX = 64 * MIB


@pytest.fixture
def arrays():
    return {str(n): np.full(64 * MIB // 8, n, np.int64) for n in range(LEAVES)}


def peak_of(act):
    peak = PeakMemory()
    peak.start()
    act()
    return peak.stop()


@pytest.mark.parametrize("options", [{}, {"writers": "all"}])
def test_a_blocking_save_and_a_restore_hold_no_copy(comm, shared_path, arrays, options):
    with manager(shared_path, ArrayState("arrays", arrays), **options) as checkpoints:
        saving = peak_of(checkpoints.save)
        for array in arrays.values():
            array[:] = -1
        restoring = peak_of(checkpoints.restore)
    assert {int(array[-1]) for array in arrays.values()} == set(range(LEAVES))
    most = OTHERS_BYTES_MAX if comm.rank else ROOT_BYTES_MAX
    assert saving <= most
    assert restoring <= most
