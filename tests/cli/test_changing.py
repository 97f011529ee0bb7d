# SPDX-License-Identifier: Apache-2.0
"""`prune` and `quarantine`: what goes, what stays, and when they refuse."""

from __future__ import annotations

import json

import pytest

from mpi_ckpt.cli.inspect import pruning
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from tests.commands import ask, fill, flip, run


def numbers(root) -> tuple[int, ...]:
    return tuple(reversed(recovery.survey(root).generations))


def test_prune_keeps_what_is_asked_for(tmp_path):
    root = fill(tmp_path / "c", 5)
    answer = ask("prune", root, "--keep-last", 2)
    assert answer["removed"] == [1, 2, 3]
    assert answer["kept"] == [4, 5]
    assert numbers(root) == (4, 5)
    assert run("verify", root, "--all").exit_code == 0


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--keep-every", "200"], [1, 2, 4, 5]),
        (["--keep-best", "loss", "--mode", "max"], [1, 5]),
        (["--keep-last", "1", "--keep-best", "loss", "--mode", "min"], [5]),
    ],
)
def test_policies_are_those_of_options(tmp_path, options, kept):
    root = fill(tmp_path / "c", 5)
    assert ask("prune", root, *options)["kept"] == kept
    assert list(numbers(root)) == kept


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--keep-best", "loss"], "--mode min or --mode max"),
        (["--keep-last", "1", "--mode", "max"], "of which metric"),
        (["--keep-best", "lost", "--mode", "min"], "there: loss. Nothing was removed"),
    ],
)
def test_a_best_that_means_nothing_is_refused(tmp_path, options, told):
    root = fill(tmp_path / "c", 3)
    result = run("prune", root, *options)
    assert result.exit_code == 2
    assert told in result.stderr
    assert numbers(root) == (1, 2, 3)


def test_prune_says_what_it_ranks_by_before_anything_goes(tmp_path, monkeypatch):
    root = fill(tmp_path / "c", 4)
    rules = ["--keep-last", 1, "--keep-every", 200, "--keep-best", "loss", "--mode", "max"]
    told = [
        "keep-last: by generation, newest first; keeps the first",
        "  in that order: 4, 3, 2, 1",
        "keep-every: by step, oldest first; keeps the first of every 200 steps",
        "  in that order: 1 (100), 2 (200), 3 (300), 4 (400)",
        "keep-best: by metric loss, highest (mode max) first; keeps the first",
        "  in that order: 1 (1), 2 (0.5), 3 (0.333333), 4 (0.25)",
    ]
    planned = run("prune", root, *rules, "--dry-run").stdout.splitlines()
    assert planned[:6] == told
    assert planned[6] == "would go: 3"
    *_, best = ask("prune", root, *rules, "--dry-run")["ranked_by"]
    assert (best["by"], best["direction"]) == ("metric loss", "highest (mode max)")
    assert best["order"][0] == {"generation": 1, "value": 1.0}
    assert best["kept"] == [1]

    def cut_off(*_):
        raise OSError(5, "cut off")

    monkeypatch.setattr(pruning.Catalog, "remove", cut_off)
    result = run("prune", root, *rules)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == told


def test_what_is_kept_by_no_rule_but_as_the_newest_is_said(tmp_path):
    root = fill(tmp_path / "c", 3)
    text = run("prune", root, "--keep-best", "loss", "--mode", "max", "--dry-run").stdout
    assert "also kept, as the newest good generation: 3" in text


def test_a_dry_run_says_the_same_and_does_nothing(tmp_path):
    root = fill(tmp_path / "c", 4)
    (root / ".partial-00000009-abc").mkdir()
    (root / ".lock").unlink()
    job = CheckpointDirectory(root)
    planned = ask("prune", root, "--keep-last", 1, "--dry-run")
    assert numbers(root) == (1, 2, 3, 4)
    assert not (root / ".lock").exists()
    job.close()
    done = ask("prune", root, "--keep-last", 1)
    assert planned == done | {"dry_run": True}
    assert done["leftovers"] == [".partial-00000009-abc"]
    assert recovery.survey(root).partials == ()
    text = run("prune", root, "--keep-last", 1).stdout
    assert "removed: none" in text


def test_bytes_freed_are_those_that_nobody_shares(tmp_path):
    root = fill(tmp_path / "c", 3)
    before = ask("ls", root)["bytes_on_disk"]
    freed = ask("prune", root, "--keep-last", 1)["bytes_freed"]
    assert 0 < freed == before - ask("ls", root)["bytes_on_disk"]


@pytest.mark.parametrize("command", [["prune", "--keep-last", "1"], ["quarantine", "1"]])
def test_a_running_job_is_not_disturbed(tmp_path, command):
    root = fill(tmp_path / "c")
    job = CheckpointDirectory(root)
    job.own()
    result = run(command[0], root, *command[1:])
    job.close()
    assert result.exit_code == 1
    assert f"job {job.job}" in result.stderr
    assert numbers(root) == (1, 2, 3)
    assert run(command[0], root, *command[1:]).exit_code == 0


def test_damaged_generations_do_not_count_as_kept(tmp_path):
    root = fill(tmp_path / "c", 4)
    (root / "checkpoint-00000004" / "a%2Fstream.bin").write_bytes(b"")
    answer = ask("prune", root, "--keep-last", 1)
    assert answer["kept"] == [3]
    assert answer["left_alone"] == ["checkpoint-00000004"]
    assert numbers(root) == (3, 4)


def test_with_verify_what_stays_is_proven_first(tmp_path):
    root = fill(tmp_path / "c", 4)
    path = root / "checkpoint-00000004" / "rank-00000.safetensors"
    flip(path, path.stat().st_size - 1)
    blind = ask("prune", root, "--keep-last", 1, "--dry-run")
    assert blind["kept"] == [4]
    answer = ask("prune", root, "--keep-last", 1, "--verify")
    assert (answer["kept"], answer["removed"]) == ([3], [1, 2])
    assert answer["left_alone"] == ["checkpoint-00000004"]
    assert numbers(root) == (3, 4)


def test_prune_needs_to_be_told_what_stays(tmp_path):
    root = fill(tmp_path / "c", 1)
    assert "--keep-last N" in run("prune", root).stderr
    assert run("prune", root).exit_code == 2
    assert run("prune", root, "--keep-last", "0").exit_code == 2


def test_a_directory_of_somebody_else_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    assert run("prune", tmp_path, "--keep-last", 1).exit_code == 2
    assert run("quarantine", tmp_path, "1").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_cannot_be_removed_is_said(tmp_path, monkeypatch):
    root = fill(tmp_path / "c", 2)
    monkeypatch.setattr(pruning.Catalog, "remove", lambda *_: None)
    answer = ask("prune", root, "--keep-last", 1, code=1)
    assert (answer["failed"], answer["removed"], answer["bytes_freed"]) == ([1], [], 0)
    told = run("prune", root, "--keep-last", 1).stdout
    assert "removed: none\nkept: 2\n0 generations, freed 0 B\n" in told
    assert "could not be removed: 1\n" in told


def test_quarantine_sets_aside_with_the_reason(tmp_path):
    root = fill(tmp_path / "c")
    answer = ask("quarantine", root, "newest", "--reason", "loss went up")
    assert (answer["generation"], answer["newest"]) == (3, 2)
    aside = root / ".quarantine" / "checkpoint-00000003"
    assert json.loads((aside / "reason.json").read_text())["reason"] == "loss went up"
    assert run("verify", aside).exit_code == 0
    assert "set aside" in run("show", root, "3").stderr
    flip(root / "checkpoint-00000002" / "manifest.json", 9)
    assert ask("quarantine", root, "2")["newest"] == 1
    result = run("quarantine", root, "1")
    assert result.exit_code == 0
    assert "will refuse" in result.stderr
