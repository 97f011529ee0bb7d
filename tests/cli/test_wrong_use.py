# SPDX-License-Identifier: Apache-2.0
"""Wrong use with ``--json`` is one JSON object too; one rule for all directories."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import safetensors.numpy

from tests.commands import fill, flip, run
from tests.making import publish

if TYPE_CHECKING:
    from pathlib import Path

# What a command needs beside its directory; None where that is no argument of it.
WORDS = {
    "ls": [],
    "show": [],
    "verify": [],
    "verify --all": [],
    "diff": ["1", "2"],
    "diff of two": [],
    "prune": ["--keep-last", "1"],
    "quarantine": ["1"],
    "rollback": ["1"],
    "rollback --undo": [],
    "export": ["--to", "out.safetensors"],
}
TARGETS = ("import", "doctor")
LOOKS_AT_ONE = ("show", "verify", "diff of two", "export")


def call(command: str, path: object, *more: str):
    if command == "import":
        return run("import", "m.safetensors", "--into", path, *more)
    if command == "doctor":
        return run("doctor", "--no-mpi", path, *more)
    if command == "diff of two":
        return run("diff", path, path, *more)
    name, *options = command.split()
    return run(name, path, *options, *WORDS[command], *more)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with one of each kind."""
    fill(tmp_path / "run", 3)
    run("quarantine", tmp_path / "run", "3")
    publish(tmp_path / "copied").rename(tmp_path / "best")
    (tmp_path / "run" / ".partial-00000009-abc").mkdir()
    (tmp_path / "headless" / "checkpoint-00000001").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").write_text("job x, process 1 on host\n")
    (tmp_path / "locked" / ".lease-x").write_text("0\n")
    (tmp_path / "locked" / "lineage.json").write_text("{}")
    (tmp_path / "locked" / ".lineage-x").write_text("{")
    (tmp_path / "locked" / "halt").touch()
    (tmp_path / "foreign" / "src").mkdir(parents=True)
    (tmp_path / "adaptdl" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "adaptdl" / "checkpoint-2" / "net").write_bytes(b"x")
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "latest").symlink_to("run/checkpoint-00000002")
    (tmp_path / "loop").symlink_to("loop")
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "m.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


REFUSED = {
    "nope": "does not exist",
    "dangling": "does not exist",
    "file/x": "is no directory",
    "": "is empty",
    "file": "is no directory",
    "fifo": "is no directory",
    "loop": "ELOOP",
    "x" * 300: "ENAMETOOLONG",
    "adaptdl": "as adaptdl names them",
    "adaptdl/checkpoint-2": "as adaptdl names them",
    "run/.quarantine": "set aside; give the directory that contains it",
    "run/.partial-00000009-abc": "is a leftover",
}


@pytest.mark.parametrize("command", [*WORDS, *TARGETS])
@pytest.mark.parametrize("path", REFUSED, ids=lambda path: path[:20])
def test_what_is_no_checkpoint_directory_is_refused_by_all(place, command, path):
    before = names(place)
    if command in TARGETS and REFUSED[path] == "does not exist":
        return  # made, or a parent looked at
    result = call(command, path)
    assert result.exit_code == 2
    assert REFUSED[path] in " ".join(result.stderr.split())
    assert result.stdout == ""
    told = json.loads(call(command, path, "--json").stdout)
    assert told["error"]["exit_code"] == 2
    assert names(place) == before


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize("path", ["empty", "locked", "foreign"])
def test_a_directory_without_generations_is_refused_by_what_reads(place, command, path):
    before = names(place)
    result = call(command, path)
    assert result.exit_code == 2
    assert f"{path} holds no generation" in result.stderr
    told = json.loads(call(command, path, "--json").stdout)["error"]
    assert (told["class"], told["kind"]) == ("CommandError", "absent")
    assert names(place) == before


def test_a_job_is_watched_before_its_first_save(place):
    """Hosts may keep saves by then: lineage.json says so."""
    assert run("watch", "locked").exit_code == 0
    assert run("watch", "foreign").exit_code == 2


@pytest.mark.parametrize("command", TARGETS)
@pytest.mark.parametrize("path", ["empty", "foreign", "run", "new"])
def test_what_saves_takes_any_other_directory(place, command, path):
    assert call(command, path).exit_code == 0


OWN = [
    "run/checkpoint-00000002", "run/.quarantine/checkpoint-00000003", "best", "latest",
    "headless/checkpoint-00000001",
]  # fmt: skip


@pytest.mark.parametrize("command", [*WORDS, *TARGETS])
@pytest.mark.parametrize("path", OWN)
def test_a_generations_own_directory_is_for_what_looks_at_one(place, command, path):
    before = names(place)
    result = call(command, path)
    if command in LOOKS_AT_ONE:
        damaged = 2 if command.startswith("diff") else 1
        assert result.exit_code == (damaged if "headless" in path else 0)
        return
    assert result.exit_code == 2
    assert "is the directory of one generation" in result.stderr
    if "run/" in path:
        assert result.stderr.rstrip().endswith(": run")
    assert names(place) == before


@pytest.mark.parametrize("command", ["show", "verify", "export"])
@pytest.mark.parametrize("wanted", ["2", "newest", "nonsense"])
def test_which_generation_is_not_said_twice(place, command, wanted):
    result = run(command, OWN[0], wanted, *WORDS[command])
    assert result.exit_code == 2
    assert f"mpi-ckpt {command} run {wanted}" in " ".join(result.stderr.split())


def test_the_working_directory_may_be_a_generations_own(place, monkeypatch):
    monkeypatch.chdir("run/checkpoint-00000001")
    assert run("show", ".").exit_code == 0
    assert str(place / "run") in " ".join(run("ls", ".").stderr.split())


def test_a_relative_path_without_a_working_directory_is_told_so(
    place, tmp_path, monkeypatch
):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run("ls", place / "run").exit_code == 0
    for words in (["ls", "../run"], ["doctor", "new"]):
        result = run(*words)
        assert result.exit_code == 1
        assert "error: the working directory has been removed: ENOENT" in result.stderr


def test_a_file_that_is_of_ours_already_is_not_imported(place):
    for path in ("run", "run/checkpoint-00000001"):
        result = run("import", path, "--into", "new")
        assert result.exit_code == 2
        assert "mpi-ckpt export" in result.stderr
    assert run("import", "nope", "--into", "new").exit_code == 2
    assert not (place / "new").exists()


def test_commands_that_are_told_can_be_copied(place):
    shutil.copytree("run", "a dir;ls")
    assert "'a dir;ls' --undo" in run("rollback", "a dir;ls", "1").stdout
    assert "'a dir;ls' 2" in run("show", "a dir;ls/checkpoint-00000001", "2").stderr


WRONG = [
    [], ["nope"], ["ls"], ["ls", "run", "more"], ["ls", "run", "--nope"], ["ls", "--nope"],
    ["show", "run", "9"], ["show", "run", "x"], ["show", "run", "--state"],
    ["show", "run", "--state", "nope"], ["verify", "run", "1", "--all"], ["diff"],
    ["diff", "run"], ["diff", "run", "1", "2", "3"], ["prune", "run"],
    ["prune", "run", "--keep-last", "0"], ["prune", "run", "--keep-last", "x"],
    ["prune", "run", "--keep-best", "loss"], ["prune", "run", "--mode", "up"],
    ["quarantine", "run"], ["rollback", "run"], ["rollback", "run", "1", "--undo"],
    ["export", "run"], ["export", "run", "--to", "file"], ["export", "run", "--to", "x"],
    ["import", "m.safetensors"],
    ["import", "fifo", "--into", "new"],
    ["import", "m.safetensors", "--into", "new", "--step", "x"],
    ["doctor", "a", "b"], ["run"], ["run", "--np", "0", "x"], ["run", "--np", "2"],
    ["run", "--np", "1", "--min-np", "2", "x"],
    ["run", "--np", "1", "--hostfile", "no", "x"],
    ["run", "--np", "1", "no-such-program"], ["ls", "run", "--json=1"],
]  # fmt: skip


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(words)[:40])
def test_wrong_use_is_answered_with_json_and_the_same_code(place, words):
    as_text = run(*words)
    assert as_text.exit_code in (1, 2)
    for place_of_json in {0, min(1, len(words))} | (
        {len(words)} if words[:1] != ["run"] else set()
    ):
        with_json = [*words[:place_of_json], "--json", *words[place_of_json:]]
        result = run(*with_json)
        assert result.exit_code == as_text.exit_code, with_json
        document = json.loads(result.stdout)
        assert set(document) == {"error"}
        assert set(document["error"]) == {"message", "class", "kind", "exit_code"}
        assert document["error"]["exit_code"] == result.exit_code
        assert result.stderr == ""


@pytest.mark.parametrize("word", ["9" * 5000, "checkpoint-" + "9" * 5000])
def test_a_word_without_end_is_no_generation(place, word):
    for words in (["show", "run", word], ["diff", "run", "1", word], ["pin", "run", word]):
        result = run(*words)
        assert result.exit_code == 2
        assert "is no generation" in result.stderr


def test_the_json_of_a_program_is_its_own(place):
    result = run("run", "no-such-program", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert run("ls", "--", "--json").stdout == ""
    assert run("show", "--json", "--help").stdout.startswith("Usage")


def test_damage_is_answered_with_json(place):
    flip(place / "run" / "checkpoint-00000002" / "manifest.json", 30)
    for words, code in ((["show", "run", "2"], 1), (["diff", "run", "1", "2"], 2)):
        assert run(*words).exit_code == code
        told = json.loads(run(*words, "--json").stdout)["error"]
        assert (told["class"], told["exit_code"]) == ("CorruptGenerationError", code)
