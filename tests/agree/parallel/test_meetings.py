# SPDX-License-Identifier: Apache-2.0
"""How often the ranks wait for one another, and how deep a save is."""

from tests.programs.meetings import MOST, count


def test_a_save_and_a_restore_meet_no_more_often_than_they_must(comm, shared_path):
    saving, restoring, stack = count(comm, shared_path)
    assert 0 < len(saving) <= MOST["save"], saving
    assert 0 < len(restoring) <= MOST["restore"], restoring
    if comm.rank == 0:
        assert 1 < len(stack) <= MOST["frames"], stack
