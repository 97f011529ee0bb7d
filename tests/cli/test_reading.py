# SPDX-License-Identifier: Apache-2.0
"""`ls`, `show`, `verify` and `diff`: what they say, and that they change nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import closing

import numpy as np
import pytest

from mpi_ckpt.cli import generations as survey
from mpi_ckpt.cli.inspect import verifying
from mpi_ckpt.cli.plain_text import age, ago, bytes_text, clean, plural
from mpi_ckpt.errors import ReadError
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.owning.ownership import Ownership
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.commands import ask, fill, flip, run
from tests.making import document_of, publish, sealed_document


def snapshot(root):
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[path] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


@pytest.mark.parametrize("command", ["ls", "show", "verify", "diff"])
def test_reading_takes_no_lock_and_changes_nothing(tmp_path, command):
    root = fill(tmp_path / "c")
    (root / ".lock").unlink()
    (root / ".partial-00000009-abc").mkdir()
    before = snapshot(tmp_path)
    words = ("1", "2") if command == "diff" else ()
    assert run(command, root, *words).exit_code in (0, 1)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["ls", "show", "verify", "diff"])
def test_reading_works_while_a_job_holds_the_directory(tmp_path, command):
    root = fill(tmp_path / "c")
    job = CheckpointDirectory(root)
    job.own()
    words = ("1", "1") if command == "diff" else ()
    assert run(command, root, *words).exit_code == 0
    assert f"in use by job {job.job}" in run("ls", root).stdout
    job.close()
    assert ask("ls", root)["lock_holder"] is None


def test_a_job_is_seen_by_its_lease_as_long_as_that_is_renewed(tmp_path, monkeypatch):
    root = fill(tmp_path / "c")
    monkeypatch.setattr(fcntl, "flock", refuse_flock)
    with closing(CheckpointDirectory(root, ownership=Ownership(locking="lease"))) as job:
        job.own()
        assert f"in use by job {job.job}" in run("ls", root).stdout
        lease = root / f".lease-{job.job}"
        os.utime(lease, (0, 0))
        assert ask("ls", root)["lock_holder"] is None


def refuse_flock(*_):
    raise OSError(errno.EOPNOTSUPP, "no locks")


def test_ls_lists_everything_with_its_state(tmp_path):
    root = fill(tmp_path / "c", 4)
    flip(root / "checkpoint-00000004" / "manifest.json", 30)
    (root / "checkpoint-00000002" / "rank-00000.safetensors").unlink()
    assert run("quarantine", root, "1", "--reason", "too old").exit_code == 0
    (root / ".partial-00000005-abc").mkdir()
    (root / ".partial-00000005-abc" / "rank-00000.safetensors").write_bytes(b"12345")
    answer = ask("ls", root)
    rows = {row["name"]: row for row in answer["generations"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "checkpoint-00000002": "damaged",
        "checkpoint-00000003": "newest",
        "checkpoint-00000004": "damaged",
        ".quarantine/checkpoint-00000001": "quarantined",
        ".partial-00000005-abc": "partial",
    }
    third = rows["checkpoint-00000003"]
    assert (third["step"], third["ranks"], third["metrics"]) == (300, 4, {"loss": 1 / 3})
    assert third["bytes_shared"] > 5000 * 8
    assert third["bytes"] > third["bytes_shared"]
    assert rows[".quarantine/checkpoint-00000001"]["reason"] == "too old"
    assert rows[".partial-00000005-abc"]["bytes"] == 5
    assert answer["bytes_on_disk"] < sum(row["bytes"] for row in rows.values())
    text = run("ls", root).stdout
    assert "ENOENT" in text
    assert "own digest" in text
    assert "3 generations" in text


def test_a_newer_format_is_told_apart_from_damage(tmp_path):
    path = publish(tmp_path)
    document = document_of(path) | {"version": 4}
    (path / "manifest.json").write_bytes(sealed_document(document))
    assert ask("ls", tmp_path)["generations"][0]["state"] == "unsupported"
    assert ask("verify", tmp_path, code=1)["generations"][0]["state"] == "unsupported"
    assert ask("show", tmp_path, "1", code=1)["error"]["kind"] == "UnsupportedFormatError"


def test_names_from_files_cannot_drive_the_terminal(tmp_path):
    publish(tmp_path, [ArrayState("s", {"[red]\x1b[2J\u202eleaf": np.ones(1)})])
    shown = run("show", tmp_path).stdout
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "[red]\\x1b[2J\\u202eleaf" in shown


def test_show_names_states_leaves_and_digests(tmp_path):
    root = fill(tmp_path / "c")
    shown = run("show", root).stdout
    for word in ("step", "300", "frozen: 1 leaf", "F64", "5000", "0 x 4", "a stream of"):
        assert word in shown
    assert "plain values" in shown
    answer = ask("show", root, "2", "--state", "arrays")
    assert (answer["generation"], answer["ranks"]) == (2, 4)
    (state,) = answer["states"]
    with GenerationReader(root / "checkpoint-00000002") as reader:
        leaves = reader.manifest.state("arrays").leaves
    assert [stored["digest"] for stored in state["leaves"]] == [
        leaf.digest.whole.hex() for leaf in leaves
    ]
    assert state["leaves"][1]["shape"] == [0, 4]


def test_show_cuts_long_lists_off_and_says_so(tmp_path):
    publish(tmp_path, [ArrayState("s", {f"leaf{i}": np.ones(1) for i in range(99)})])
    assert "59 more: --all" in run("show", tmp_path).stdout
    assert "leaf98" in run("show", tmp_path, "--all").stdout
    assert len(ask("show", tmp_path)["states"][0]["leaves"]) == 99


def test_show_has_structures_on_demand(tmp_path):
    root = fill(tmp_path / "c")
    assert '"epoch": 3' in run("show", root, "--structure").stdout
    states = {s["name"]: s for s in ask("show", root, "--structure")["states"]}
    assert states["progress"]["structure"] == {"epoch": 3, "seen": [1, 2]}


@pytest.mark.parametrize("name", ["2", "checkpoint-00000002", "newest"])
def test_generations_go_by_number_name_or_newest(tmp_path, name):
    root = fill(tmp_path / "c", 2)
    assert ask("show", root, name)["generation"] == 2
    assert ask("show", root / "checkpoint-00000002")["generation"] == 2


def test_newest_is_what_a_restore_takes(tmp_path):
    root = fill(tmp_path / "c")
    flip(root / "checkpoint-00000003" / "manifest.json", 30)
    assert ask("show", root)["generation"] == 2
    # To verify it would be no finding to go back in silence.
    assert ask("verify", root, code=1)["generations"][0]["generation"] == 3


def test_when_none_is_good_all_are_named(tmp_path):
    root = fill(tmp_path / "c", 2)
    for number in (1, 2):
        flip(root / f"checkpoint-0000000{number}" / "manifest.json", 30)
    answer = ask("show", root, code=1)
    assert answer["error"]["message"].count("own digest") == 2
    assert "only files of others" in ask("show", tmp_path, code=2)["error"]["message"]


def test_structures_nested_to_the_limit_are_no_crash(tmp_path):
    deep: list = []
    for _ in range(400):
        deep = [deep]
    for root, inner in ((tmp_path / "a", deep), (tmp_path / "b", [])):
        (root / "x").mkdir(parents=True)
        path = publish(root, [])
        document = document_of(path)
        document["states"] = [{"name": "s", "structure": inner, "leaves": []}]
        (path / "manifest.json").write_bytes(sealed_document(document))
    first, second = (tmp_path / n / "checkpoint-00000001" for n in "ab")
    assert run("diff", first, second).exit_code == 1
    assert run("show", first, "--structure").exit_code in (0, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["9"], "there: 1, 2, 3"),
        (["x"], "no generation: give a number"),
        (["1", "--state", "nope"], "has no state 'nope'; there: 'frozen'"),
    ],
)
def test_wrong_names_are_answered_with_those_that_are_there(tmp_path, words, message):
    root = fill(tmp_path / "c")
    result = run("show", root, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert ask("show", root, *words, code=2)["error"]["kind"] in ("absent", "usage")


@pytest.mark.parametrize("command", ["ls", "show", "verify", "prune", "quarantine"])
def test_a_directory_that_is_not_there_is_wrong_usage(tmp_path, command):
    result = run(command, tmp_path / "nope", *(["1"] if command == "quarantine" else []))
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_commands_that_are_not_there_are_guessed():
    result = run("lss", ".")
    assert result.exit_code == 2
    assert "did you mean 'ls'?" in result.stderr


def test_verify_proves_every_byte_and_names_the_leaf(tmp_path):
    root = fill(tmp_path / "c")
    answer = ask("verify", root, "--all")
    assert answer["good"]
    assert [record["generation"] for record in answer["generations"]] == [3, 2, 1]
    assert all(record["bytes"] > 44000 for record in answer["generations"])
    path = root / "checkpoint-00000003" / "rank-00000.safetensors"
    flip(path, path.stat().st_size - 1)
    answer = ask("verify", root, "--all", code=1)
    assert [record["state"] for record in answer["generations"]] == [
        "damaged",
        "good",
        "good",
    ]
    (problem,) = answer["generations"][0]["problems"]
    assert problem["leaf"] == "arrays/grows"
    text = run("verify", root).stdout
    assert "arrays/grows: " in text
    assert "1 of 1 generation bad" in text
    assert run("verify", root, "2").exit_code == 0


def test_every_flipped_byte_of_data_is_found(tmp_path):
    path = publish(tmp_path, [ArrayState("s", {"x": np.arange(4, dtype=np.int8)})])
    for name in ("manifest.json", "rank-00000.safetensors"):
        whole = (path / name).read_bytes()
        for offset in range(0, len(whole), 211):
            flip(path / name, offset)
            result = run("verify", tmp_path)
            assert result.exit_code == 1, (name, offset)
            (path / name).write_bytes(whole)
    assert run("verify", tmp_path).exit_code == 0


def test_hostile_entries_are_damage_not_a_crash(tmp_path):
    root = fill(tmp_path / "c")
    file = root / "checkpoint-00000003" / "rank-00000.safetensors"
    target = tmp_path / "elsewhere"
    file.rename(target)
    file.symlink_to(target)
    (root / "checkpoint-00000004").symlink_to(root / "checkpoint-00000001")
    (root / "checkpoint-00000005").write_bytes(b"")
    (root / "checkpoint-00000006").mkdir()
    (root / "checkpoint-00000006" / "manifest.json").mkdir()
    states = {r["name"][-1]: r["state"] for r in ask("ls", root)["generations"]}
    assert states == {
        "1": "ok", "2": "newest", "3": "damaged", "4": "damaged", "5": "damaged",
        "6": "damaged",
    }  # fmt: skip
    assert run("verify", root, "--all").exit_code == 1


def test_what_vanishes_meanwhile_is_gone_not_bad(tmp_path, monkeypatch):
    root = fill(tmp_path / "c")

    def vanishing(path):
        if path.name == "checkpoint-00000002":
            shutil.rmtree(path, ignore_errors=True)
        return GenerationReader(path)

    monkeypatch.setattr(survey, "GenerationReader", vanishing)
    monkeypatch.setattr(verifying, "GenerationReader", vanishing)
    states = [row["state"] for row in ask("ls", root)["generations"]]
    assert states == ["ok", "gone", "newest"]
    fill_again = shutil.copytree(root / "checkpoint-00000001", root / "checkpoint-00000002")
    assert fill_again.exists()
    answer = ask("verify", root, "--all")
    assert [record["state"] for record in answer["generations"]] == ["good", "gone", "good"]
    shutil.copytree(root / "checkpoint-00000001", root / "checkpoint-00000002")
    assert ask("show", root, "2", code=1)["error"]["kind"] == "gone"
    shutil.copytree(root / "checkpoint-00000001", root / "checkpoint-00000002")
    assert ask("verify", root, "2", code=1)["error"]["kind"] == "gone"


def test_a_disk_that_cannot_be_read_is_not_called_damage(tmp_path, monkeypatch):
    root = fill(tmp_path / "c", 1)

    def failing(self, file, into, offset):
        raise ReadError("reading failed: EIO")

    monkeypatch.setattr(GenerationReader, "read_direct", failing)
    answer = ask("verify", root, code=1)
    assert answer["generations"][0]["state"] == "unreadable"


def test_diff_counts_and_measures(tmp_path):
    root = fill(tmp_path / "c")
    answer = ask("diff", root, "2", "3", code=1)
    assert (answer["equal"], answer["changed"], answer["same"]) == (3, 1, False)
    (leaf,) = answer["leaves"]
    assert (leaf["state"], leaf["leaf"], leaf["change"]) == ("arrays", "grows", "changed")
    assert leaf["elements_differing"] == 3
    assert leaf["max_abs"] == 1.0
    assert leaf["max_rel"] == 1.0
    assert answer["values"] == [
        {"state": "progress", "path": "epoch", "left": 2, "right": 3}
    ]
    text = run("diff", root, "2", "3").stdout
    assert "0.3 %" in text
    assert "epoch: 2 -> 3" in text
    assert run("diff", root, "3", "newest").exit_code == 0


def test_diff_tells_added_removed_and_reshaped(tmp_path):
    first = publish(tmp_path / "a", [ArrayState("s", {"x": np.ones(6), "old": np.ones(1)})])
    second = publish(
        tmp_path / "b", [ArrayState("s", {"x": np.ones((2, 3)), "new": np.ones(1)})]
    )
    answer = ask("diff", first, second, code=1)
    assert {leaf["leaf"]: leaf["change"] for leaf in answer["leaves"]} == {
        "x": "changed", "old": "removed", "new": "added",
    }  # fmt: skip
    assert "6 -> 2 x 3" in run("diff", first, second).stdout


def test_diff_in_trouble_is_not_a_difference(tmp_path):
    root = fill(tmp_path / "c")
    assert run("diff", root, "1").exit_code == 2
    assert run("diff", root, "1", "9").exit_code == 2
    assert run("diff", tmp_path / "nope", "1", "2").exit_code == 2
    path = root / "checkpoint-00000003" / "rank-00000.safetensors"
    flip(path, path.stat().st_size - 1)
    assert ask("diff", root, "2", "3", code=2)["error"]["kind"] == "CorruptGenerationError"


def test_people_are_told_sizes_ages_and_counts():
    assert [bytes_text(n) for n in (0, 1023, 1024, 1 << 20, (1 << 20) - 1, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 MiB", "5.0 TiB",
    ]  # fmt: skip
    assert bytes_text(1 << 60) == "1048576.0 TiB"
    assert [age(0, now) for now in (5, 300, 9000, 200_000, -1)] == [
        "5 s", "5 min", "2 h", "2 d", "in future",
    ]  # fmt: skip
    assert [ago(0, now) for now in (300, -1)] == ["5 min ago", "in future"]
    assert (plural(1, "leaf"), plural(2, "leaf")) == ("1 leaf", "2 leaves")
    assert clean("a\nb\x00\ud800") == "a\\nb\\x00\\ud800"


def test_verify_shows_how_far_it_is_where_somebody_looks(tmp_path, monkeypatch):
    root = fill(tmp_path, 2)
    assert run("verify", root, "--all").stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal has it
    monkeypatch.setenv("TERM", "xterm")
    shown = run("verify", root, "--all").stderr
    for generation in ("1 of 2, checkpoint-00000002", "2 of 2, checkpoint-00000001"):
        line = next(line for line in reversed(shown.split("\r")) if generation in line)
        assert "43.1/43.1 KiB" in line
        assert "B/s" in line
        assert "0:00:00" in line
    assert run("verify", root, "--all", "--json").stderr == ""
