# SPDX-License-Identifier: Apache-2.0
"""Saves of some states: cut state that is not saved comes from the newest generation."""

import errno
import os

import pytest

from mpi_ckpt import ObjectState
from mpi_ckpt.storage import filesystem
from tests.cut import cuts
from tests.cut.mixture import Mixture
from tests.ranks import manager, on_first


def refuse_links(source, target):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
def test_tiles_are_carried_over(peers, shared_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(filesystem, "link_file", refuse_links)
    job = Mixture(peers)
    with manager(shared_path, *job.states, comm=peers) as ours:
        job.move(1)
        ours.save(step=1)
        job.move(2)
        ours.save(step=2, only=["object", "whole"])
        # What was carried is carried again, from whichever generation wrote it.
        job.move(3)
        ours.save(step=3, only=["sampler"])
        assert ours.save(step=4, only=["rows"]).generation == 4

    def restored(part):
        other = Mixture(part, cuts.grid)
        other.move(9)
        with manager(shared_path, *other.states, comm=part) as mine:
            assert mine.restore().generation == 4
        wrong = {
            step: set(other.problems(step, same_size=part.size == peers.size))
            for step in (1, 2, 3)
        }
        assert wrong[1] == {"rows", "object", "whole", "sampler"}
        assert {"object", "whole"}.isdisjoint(wrong[2])
        assert {"rows", "sampler"}.isdisjoint(wrong[3])

    for size in range(1, peers.size + 1):
        on_first(peers, size, restored)


def test_a_part_of_the_ranks_carries_what_more_ranks_saved(peers, shared_path):
    """The program of fewer ranks does not even know the cut state."""
    job = Mixture(peers)
    with manager(shared_path, *job.states, comm=peers) as ours:
        job.move(1)
        ours.save(step=1)

    def count(part):
        state = ObjectState("object", {"step": 0})
        with manager(shared_path, state, comm=part, strict=False) as mine:
            mine.restore(only=["object"])
            state.value = {"step": 2}
            mine.save(step=2, only=["object"])

    on_first(peers, peers.size - 1, count)
    job.move(9)
    with manager(shared_path, *job.states, comm=peers) as ours:
        assert ours.restore().generation == 2
    assert job.problems(1) == ["object"]
    assert job.object.value == {"step": 2}
