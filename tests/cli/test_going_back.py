# SPDX-License-Identifier: Apache-2.0
"""`rollback`: what is set aside, what comes back, what refuses; and what jobs see of it."""

from __future__ import annotations

import errno
from contextlib import closing

import pytest

from mpi_ckpt.choice import Choice
from mpi_ckpt.cli.plain_text import bytes_text
from mpi_ckpt.errors import CorruptGenerationError, NoCheckpointError
from mpi_ckpt.retention import KeepLast
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.directory.catalog import Catalog
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.directory.finding import open_chosen, open_newest_there
from tests.commands import ask, fill, flip, run
from tests.making import publish
from tests.recording import RecordingOS


def numbers(root) -> tuple[int, ...]:
    return tuple(reversed(recovery.survey(root).generations))


def test_newer_ones_are_set_aside_and_brought_back(tmp_path):
    root = fill(tmp_path / "c", 5)
    before = {path.name: path.stat().st_ino for path in root.glob("checkpoint-*")}
    answer = ask("rollback", root, 3)
    assert answer == {
        "generation": 3,
        "step": 300,
        "set_aside": [4, 5],
        "next_generation": 6,
        "names": [".rolled-back-00000005-00000004", ".rolled-back-00000005-00000005"],
    }
    assert numbers(root) == (1, 2, 3)
    assert ask("rollback", root, "--undo") == {
        "back": [4, 5],
        "newest": 5,
        "still_aside": [],
    }
    assert {path.name: path.stat().st_ino for path in root.glob("checkpoint-*")} == before


def test_it_says_what_it_did_and_how_to_undo_it(tmp_path):
    root = fill(tmp_path / "c", 4)
    text = run("rollback", root, "checkpoint-00000002").stdout
    assert "set aside: 3, 4\n" in text
    assert (
        "a restore takes generation 2, step 200; the next save becomes generation 5" in text
    )
    assert f"mpi-ckpt rollback {root} --undo" in text
    assert "nothing is newer than generation 2" in run("rollback", root, 2).stdout
    text = run("rollback", root, "--undo").stdout
    assert "back: 3, 4\n" in text
    assert "a restore takes generation 4, step 400\n" in text


def test_it_says_what_their_removal_would_free(tmp_path):
    root = fill(tmp_path / "c", 4)
    own = {row["name"]: row["own"] for row in ask("du", root)["generations"]}
    assert own["checkpoint-00000004"] < ask("ls", root)["generations"][3]["bytes"]
    text = run("rollback", root, 3).stdout
    assert f"to free {bytes_text(own['checkpoint-00000004'])}: rm -r " in text


def test_jobs_do_not_see_them_and_do_not_take_their_numbers(tmp_path):
    root = fill(tmp_path / "c", 4)
    run("rollback", root, 2)
    with open_newest_there(Catalog(root)) as reader:
        assert reader.manifest.generation == 2
    assert Catalog(root).choose(KeepLast(1)) == (1,)
    assert publish(root, step=201).name == "checkpoint-00000005"
    assert ask("prune", root, "--keep-last", 1)["removed"] == [1, 2]
    assert numbers(root) == (5,)
    answer = ask("rollback", root, "--undo")
    assert (answer["back"], answer["newest"]) == ([3, 4], 5)
    assert numbers(root) == (3, 4, 5)
    assert run("verify", root, "--all").exit_code == 0


def test_one_rollback_after_another_is_undone_in_turn(tmp_path):
    root = fill(tmp_path / "c", 5)
    run("rollback", root, 4)
    run("rollback", root, 2)  # nothing was saved since: the same one, as it were
    publish(root)
    publish(root)
    assert ask("rollback", root, 6)["set_aside"] == [7]
    answer = ask("rollback", root, "--undo")
    assert answer["back"] == [7]
    assert len(answer["still_aside"]) == 3
    run("rollback", root, 6)
    assert "3 generations of an earlier rollback" in run("rollback", root, "--undo").stdout
    text = run("rollback", root, "--undo").stdout
    assert "back: 3, 4, 5\n" in text
    assert "takes generation 7, step 1, saved since" in text
    assert numbers(root) == (1, 2, 3, 4, 5, 6, 7)


def test_what_was_set_aside_is_listed_and_told(tmp_path):
    root = fill(tmp_path / "c", 4)
    run("rollback", root, 2)
    rows = ask("ls", root)["generations"]
    assert [row["state"] for row in rows] == ["ok", "newest", "rolled back", "rolled back"]
    assert [row["step"] for row in rows] == [100, 200, 300, 400]
    lines = run("ls", root).stdout.splitlines()
    assert any(line.startswith("3 ") and line.endswith("rolled back") for line in lines)
    assert "2 generations, " in lines[-1]
    result = run("show", root, 3)
    assert result.exit_code == 2
    assert f"mpi-ckpt rollback {root} --undo" in result.stderr
    with pytest.raises(NoCheckpointError, match="--undo brings back"):
        open_chosen(Catalog(root), Choice(3))


def test_a_directory_of_which_all_was_set_aside_is_no_fresh_start(tmp_path):
    root = fill(tmp_path / "c", 2)
    run("rollback", root, 1)
    (root / "checkpoint-00000001").rename(tmp_path / "elsewhere")
    with (
        closing(CheckpointDirectory(root)) as directory,
        pytest.raises(CorruptGenerationError, match="--undo brings back"),
    ):
        directory.open_newest()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([9], "has no generation 9"),
        ([], "give the GENERATION"),
        ([2, "--undo"], "give the GENERATION"),
        (["--undo"], "nothing that a rollback has set aside"),
        (["two"], "is no generation"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, words, told):
    root = fill(tmp_path / "c")
    (root / ".lock").unlink()
    result = run("rollback", root, *words)
    assert result.exit_code == 2
    assert told in result.stderr
    assert numbers(root) == (1, 2, 3)
    assert not (root / ".lock").exists()


def test_a_damaged_one_is_not_gone_back_to(tmp_path):
    root = fill(tmp_path / "c")
    flip(root / "checkpoint-00000002" / "manifest.json", 100)
    result = run("rollback", root, 2)
    assert result.exit_code == 1
    assert "choose another generation. Nothing was changed" in result.stderr
    assert numbers(root) == (1, 2, 3)


@pytest.mark.parametrize("words", [[1], ["--undo"]])
def test_a_running_job_is_not_disturbed(tmp_path, words):
    root = fill(tmp_path / "c")
    run("rollback", root, 2)
    job = CheckpointDirectory(root)
    job.own()
    result = run("rollback", root, *words)
    job.close()
    assert result.exit_code == 1
    assert f"job {job.job}" in result.stderr
    assert numbers(root) == (1, 2)
    assert run("rollback", root, *words).exit_code == 0


def test_a_copy_that_is_in_the_way_is_told(tmp_path):
    root = fill(tmp_path / "c", 2)
    run("rollback", root, 1)
    publish(tmp_path / "other")
    (tmp_path / "other" / "checkpoint-00000001").rename(root / "checkpoint-00000002")
    result = run("rollback", root, "--undo")
    assert result.exit_code == 1
    assert "holds generations 2 twice, published and set aside" in result.stderr
    assert len(recovery.survey(root).rolled_back) == 1


@pytest.mark.parametrize("call", ["rename", "fsync"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_failing_disk_loses_nothing_and_it_can_be_called_again(
    tmp_path, monkeypatch, call, nth
):
    root = fill(tmp_path / "c", 4)
    for words in ([2], ["--undo"]):
        monkeypatch.setattr(filesystem, "os", RecordingOS(call, nth, errno.EIO))
        result = run("rollback", root, *words)
        failed = filesystem.os.fired
        monkeypatch.undo()
        assert failed or call == "fsync"  # there is one for all
        assert result.exit_code == int(failed)
        if failed:
            assert "Nothing was deleted" in result.stderr
        found = recovery.survey(root)
        assert len(found.generations) + len(found.rolled_back) == 4
        if not failed or (call, words) == ("fsync", ["--undo"]):
            continue  # all was moved, only not yet for good
        assert run("rollback", root, *words).exit_code == 0
        assert numbers(root) == ((1, 2) if words == [2] else (1, 2, 3, 4))
    assert numbers(root) == (1, 2, 3, 4)


def test_a_job_that_was_cut_off_can_publish_no_more(tmp_path):
    root = fill(tmp_path / "c", 3)
    job = CheckpointDirectory(root)
    job.own()
    partial = job.begin()
    job.close()  # as if its lock were lost
    run("rollback", root, 2)
    assert recovery.survey(root).partials == ()
    assert not partial.path.exists()
    assert numbers(root) == (1, 2)
