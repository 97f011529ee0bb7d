# SPDX-License-Identifier: Apache-2.0
"""Horovod elastic's states: what fails with them, and what does not with ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.horovod.playing import play
from tests.launch import run_job

SCENES = "tests.integrations.horovod.scenes.elastic"


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / "root")


@pytest.fixture
def both(root):
    """Plays a scene with Horovod's classes, then with ours."""

    def both(name, *arguments, ranks=2):
        return tuple(
            play(f"{SCENES}:{name}", ranks, whose, root, *arguments)
            for whose in ("theirs", "ours")
        )

    return both


def ours(name, *arguments, **options):
    return play(f"{SCENES}:{name}", 2, *arguments, **options)


def test_changes_in_place_and_later_attributes_are_undone(both):
    theirs, ours = both("in_place")
    assert theirs.common == {"history": [1, "uncommitted"], "later": "uncommitted"}
    assert ours.common == {"history": [1], "later": [1]}


def test_sync_takes_live_values_of_everything(both):
    theirs, ours = both("live_weights_old_counters")
    assert theirs.common == {"weight": 23, "batch": 1}
    assert ours.common == {"weight": 23, "batch": 23}


def test_restore_after_sync_brings_nothing_old_back(both):
    theirs, ours = both("sync_then_restore")
    assert [record["weight"] for record in theirs.all] == [10, 11]
    assert [record["lr"] for record in theirs.all] == [0.1, 0.2]
    assert ours.common == {"synced": 10, "weight": 10, "lr": 0.1}


@pytest.mark.parametrize(("rank", "found"), [(0, "interrupted"), (1, "nothing")])
def test_a_notice_counts_on_whichever_rank_it_comes(both, rank, found):
    theirs, ours = both("told_on", rank)
    assert theirs.common == found
    assert ours.common == "interrupted"


def test_a_tracked_scheduler_stays_the_optimizers(both):
    theirs, ours = both("scheduler_after_sync")
    # Horovod has put a pickled copy in its place on rank 1, over an optimizer of its own.
    assert theirs.all == [0.05, 0.1]
    assert ours.common == 0.05


def test_single_methods(both):
    theirs, ours = both("small_things", ranks=3)
    assert theirs.common == {"position": 0, "few": "AssertionError: ", "assigned": 2}
    assert ours.common == {"position": 6, "few": None, "assigned": 1}


def test_ranks_that_track_different_attributes_are_told(both):
    theirs, ours = both("tracks_more_on_one_rank")
    assert theirs.common is None
    assert ours.common.startswith("RegistrationError: the ranks track different attributes")


def test_ranks_that_commit_unequally_often_are_told(both):
    theirs, ours = both("save_on_one_rank")
    assert [record["batch"] for record in theirs.all] == [5, 0]
    for record in ours.all:
        assert record["batch"] == 0
        assert [text.split(": ")[1] for text in record["told"]] == ["save()", "restore()"]


def test_a_bug_is_not_tried_for_ever(both):
    theirs, ours = both("mismatched_shapes")
    assert theirs.common["kind"] == "EnoughError", (
        "it has ended by the test's own limit only"
    )
    found = ours.common
    assert (found["tries"], found["kind"]) == (3, "CollectiveError")
    assert "3 times in a row" in found["text"]
    assert "One rank sent a tensor of shape [2]" in found["text"]


def test_horovod_is_started_again_with_what_it_was_given(both):
    theirs, ours = both("restarted_with")
    for rank, (before, after) in enumerate(zip(theirs.all, ours.all, strict=True)):
        turned = 1 - rank
        assert before["seen"][0][0] == turned
        assert before["seen"][1][0] == rank, "Horovod has forgotten its communicator"
        assert "does not exist" in before["seen"][1][1], "and its process set"
        assert before["sets"] == [0]
        assert after["seen"] == [[turned, 1]] * 2
        assert after["sets"] == [0, 1]
        assert after["batch"] == 1


def test_samplers_share_out_again_after_a_removal(both):
    theirs, ours = both("removal", ranks=3)
    done = set(range(15))
    for rank in (0, 1):
        found = theirs.results[rank]
        assert (found["replicas"], found["size"]) == (3, 2)
        assert set(range(60)) - done - set(found["read"]), "some are never read"
        found = ours.results[rank]
        assert (found["replicas"], found["size"]) == (2, 2)
        assert set(found["read"]) == set(range(60)) - done


def test_states_go_on_where_the_program_has_shut_horovod_down(both):
    theirs, ours = both("shut_down_under_us")
    assert theirs.common == "ValueError: Horovod has not been initialized; use hvd.init()."
    assert ours.common == 2


def test_a_run_starts_horovod_again_that_one_rank_has_shut_down(root):
    found = ours("shut_down_in_a_run", root).common
    assert found == {"starts": [0, 3], "batch": 6, "equal": True}


def test_an_error_on_one_rank_alone_lets_all_go_back(root):
    assert ours("internal_error_on_one", root).common == {"batch": 4, "starts": [0, 2]}


def run_scene(*arguments, timeout=40):
    """Run a scene as a program, which ends as programs do."""
    return run_job(2, ["-m", SCENES, *arguments], timeout=timeout)


@pytest.mark.parametrize("where", ["horovod", "mpi4py", "commit"])
def test_a_bug_on_one_rank_ends_the_job_with_its_commit_on_disk(root, where):
    job = run_scene("leaves_alone", "ours", root, where)
    assert job.code not in (0, 124), job.text
    assert "ZeroDivisionError: a bug on one rank" in job.err
    assert [path.name for path in Path(root).glob("checkpoint-*")] == [
        "checkpoint-00000001"
    ]


def test_a_bug_on_one_rank_leaves_horovods_peers_hanging_in_mpi4py(root):
    job = run_scene("leaves_alone", "theirs", root, "mpi4py", timeout=20)
    assert job.code == 124, job.text


def test_a_rank_that_goes_back_alone_while_others_are_in_mpi4py_names_them(root):
    job = run_scene("goes_back_alone", root)
    assert job.code not in (0, 124), job.text
    assert "CollectiveError: restore(): rank 0 on " in job.err
    assert "seen here only" in job.err


@pytest.mark.parametrize("where", ["horovod", "commit", "save"])
def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(root, where):
    played = ours("dies_in", root, where, timeout=40)
    assert played.job.code not in (0, 124), played.job.text
    left = [path.name for path in Path(root).iterdir() if path.name.startswith(".partial")]
    assert bool(left) == (where == "save")
    assert ours("dies_in", root, "nowhere").common == 2
    assert not list(Path(root).glob(".partial-*"))


def test_a_stopped_rank_is_named(root):
    played = ours("stands_still", root, timeout=40)
    assert played.job.code not in (0, 124), played.job.text
    assert "rank 1 on" in played.job.err
    assert "did not arrive within 2 s" in played.job.err
    assert "is stopped by a signal" in played.job.err
