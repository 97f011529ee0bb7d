# SPDX-License-Identifier: Apache-2.0
"""Every order of starting that can work does, and every other is refused on all ranks."""

from __future__ import annotations

import pytest

from tests.integrations.horovod.playing import play
from tests.integrations.horovod.scenes import starting


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / "root")


def test_mpi4py_first_and_horovod_shut_down_and_started_again_under_us(root):
    for rank, found in enumerate(play(starting.mpi4py_first, 2, root).all):
        assert found["ranks"] == [[rank] * 3] * 2
        assert found["alive"]
        assert found["step"] == 3
        assert found["value"] == 1


def test_our_manager_first(root):
    assert play(starting.ours_first, 2, root).common is True


def test_horovod_first_is_refused_and_the_reason_is_real(root):
    found = play(starting.horovod_first, 2, root).common
    for refused in found["refused"]:
        assert refused.startswith("LaunchError: Horovod's thread has started MPI")
        assert "import mpi4py.MPI before hvd.init()" in refused
    # This is why: shutting Horovod down has ended MPI under everybody.
    assert found["finalized"]
    for refused in found["after"]:
        assert refused.startswith("LaunchError: MPI has been finalized")


def test_mpi_for_one_thread_is_refused_beside_horovod_only(root):
    found = play(starting.funneled, 2, root).common
    assert found["level"]
    for refused in found["refused"]:
        assert refused.startswith("LaunchError: MPI was started for calls from one thread")


def test_horovod_without_mpi_is_refused(root):
    for refused in play(starting.without_mpi, 2, root).common:
        assert refused.startswith("LaunchError: Horovod runs 2 ranks (without MPI)")


def test_horovod_on_one_rank_only_is_refused_on_all(root):
    refused = play(starting.initialised_on_one, 2, root).common
    assert refused.startswith("LaunchError: rank 1: Horovod runs 1 ranks (over MPI)")


def test_a_communicator_given_to_horovod_is_taken_or_found(root):
    everyone = play(starting.split_and_turned_round, 4, root).all
    for rank, found in enumerate(everyone):
        assert found["given"]
        place = [{0: 1, 1: 1, 2: 0, 3: 0}[rank], 2]
        assert found["ranks"] == [place, place]
        assert "Horovod runs 2 ranks (over MPI), the communicator has 4" in found["refused"]
        assert found["value"] == {0: 2, 1: 3}[rank % 2]


def test_ranks_in_another_order_are_put_in_horovods():
    assert play(starting.turned_round, 3).all == [[2, 2, 2], [1, 1, 2], [0, 0, 2]]


def test_ranks_that_horovod_was_given_by_number_are_found():
    assert play(starting.by_ranks, 3).all == [[0, 0, 2, 2], None, [1, 1, 2, 2]]


def test_process_sets(root):
    played = play(starting.process_sets, 4, root, HOROVOD_DYNAMIC_PROCESS_SETS="1")
    for rank, found in enumerate(played.all):
        ranks = [[0, 2], [1, 3]][rank % 2]
        assert found["rank"] == [rank // 2] * 2
        assert found["model"] == [ranks[1]] * 3
        assert found["object"] == ranks[1]
        assert found["gathered"] == ranks
        assert found["step"] == ranks[0]
        assert found["all"] == 4
        assert "this rank is not in the process set" in found["stranger"]
        assert found["root"].startswith("OptionsError: root_rank is ")
