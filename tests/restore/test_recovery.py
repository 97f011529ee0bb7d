# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import os
import shutil

import pytest

from mpi_ckpt.errors import CorruptGenerationError, ReadError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory.recovery import Survey, quarantine, survey, sweep
from tests.making import publish
from tests.recording import RecordingOS

PROBLEM = CorruptGenerationError("block 3 is bad")


def make(root, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def test_missing_directory_is_empty(tmp_path):
    assert survey(tmp_path / "missing") == Survey(is_missing=True)
    assert Survey().next_generation == 1


def test_names_are_told_apart_and_the_unknown_ignored(tmp_path):
    make(
        tmp_path,
        *("checkpoint-00000002", "checkpoint-00000010", "checkpoint-100000000"),
        *("checkpoint-foo", "checkpoint-000000002", "checkpoint-5", "_checkpoint", "other"),
        *(".partial-00000011-abc", ".partial-x", ".quarantine/checkpoint-00000009"),
        *(".rolled-back-00000013-00000012", ".rolled-back-13-12", ".rolled-back"),
    )
    assert survey(tmp_path) == Survey(
        generations=(100000000, 10, 2),
        partials=(".partial-00000011-abc",),
        quarantined=("checkpoint-00000009",),
        rolled_back=(".rolled-back-00000013-00000012",),
        adaptdl=("checkpoint-5",),
    )


def test_file_in_place_of_the_directory_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReadError, match="ENOTDIR"):
        survey(tmp_path / "file")


@pytest.mark.parametrize(
    ("found", "number"),
    [
        (Survey(generations=(7, 3)), 8),
        (Survey(quarantined=("checkpoint-00000009",)), 10),
        (Survey(quarantined=("checkpoint-00000009~12", "odd")), 10),
        (Survey(generations=(7,), partials=(".partial-00000008-ab",)), 9),
        (Survey(rolled_back=(".rolled-back-00000011-00000009",)), 12),
        (Survey(adaptdl=("checkpoint-55",)), 1),
    ],
)
def test_number_was_never_used_before(found, number):
    assert found.next_generation == number


def test_sweep_removes_leftovers_only_and_only_durable_ones(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    make(tmp_path, ".partial-00000001-ab", "checkpoint-00000001")
    (tmp_path / ".partial-00000001-ab" / "f").write_bytes(b"x")
    recorder = RecordingOS()
    monkeypatch.setattr(filesystem, "os", recorder)
    sweep(tmp_path, survey(tmp_path).partials, "job")
    assert os.listdir(tmp_path) == ["checkpoint-00000001"]
    calls = recorder.names()
    assert calls.index(("fsync", tmp_path.name)) < calls.index(("unlink", "f"))
    assert "left by a run that was cut off" in caplog.text


def test_sweep_of_nothing_touches_nothing(tmp_path, monkeypatch):
    recorder = RecordingOS()
    monkeypatch.setattr(filesystem, "os", recorder)
    sweep(tmp_path, (), "job")
    assert recorder.calls == []


@pytest.mark.parametrize("call", ["fsync", "unlink"])
def test_leftovers_that_cannot_be_removed_are_told_and_stay(
    tmp_path, monkeypatch, caplog, call
):
    make(tmp_path, ".partial-00000001-ab", ".partial-00000002-ab")
    (tmp_path / ".partial-00000001-ab" / "f").write_bytes(b"x")
    monkeypatch.setattr(filesystem, "os", RecordingOS(call))
    sweep(tmp_path, survey(tmp_path).partials, "job")
    # Moved out of the reach of whoever wrote them, all the same.
    assert (tmp_path / ".partial-00000001-abxjob" / "f").exists()
    assert (tmp_path / ".partial-00000002-abxjob").exists() == (call == "fsync")
    assert "Input/output" in caplog.text
    monkeypatch.undo()
    sweep(tmp_path, survey(tmp_path).partials, "other")
    assert os.listdir(tmp_path) == []


def test_leftovers_that_cannot_be_moved_keep_no_other_from_going(
    tmp_path, monkeypatch, caplog
):
    make(tmp_path, ".partial-00000001-ab", ".partial-00000002-abxjob")
    monkeypatch.setattr(filesystem, "os", RecordingOS("rename"))
    sweep(tmp_path, survey(tmp_path).partials, "job")
    assert os.listdir(tmp_path) == [".partial-00000001-ab"]
    assert "Input/output" in caplog.text


def test_leftover_is_moved_before_any_of_its_files_goes(tmp_path, monkeypatch):
    make(tmp_path, ".partial-00000001-ab")
    (tmp_path / ".partial-00000001-ab" / "f").write_bytes(b"x")
    recorder = RecordingOS()
    monkeypatch.setattr(filesystem, "os", recorder)
    sweep(tmp_path, survey(tmp_path).partials, "job")
    calls = [call for call, _ in recorder.names()]
    assert calls.index("rename") < calls.index("fsync") < calls.index("unlink")


def test_bad_generation_is_moved_with_its_reason_and_nothing_deleted(tmp_path):
    generation = publish(tmp_path)
    before = {file.name: file.read_bytes() for file in generation.iterdir()}
    where = quarantine(tmp_path, 1, PROBLEM)
    assert where == tmp_path / ".quarantine" / "checkpoint-00000001"
    assert not generation.exists()
    reason = json.loads((where / "reason.json").read_bytes())
    assert reason == {"generation": 1, "reason": "block 3 is bad"}
    after = {f.name: f.read_bytes() for f in where.iterdir() if f.name != "reason.json"}
    assert after == before


def test_reason_is_durable_as_the_move_is(tmp_path, monkeypatch):
    publish(tmp_path)
    recorder = RecordingOS()
    monkeypatch.setattr(filesystem, "os", recorder)
    quarantine(tmp_path, 1, PROBLEM)
    calls = recorder.names()
    moved = calls.index(("rename", "checkpoint-00000001"))
    for name in (".quarantine", tmp_path.name, "reason.json"):
        assert ("fsync", name) in calls[moved:]


def test_move_that_may_not_be_durable_is_told_with_its_new_place(tmp_path, monkeypatch):
    publish(tmp_path)
    (tmp_path / ".quarantine").mkdir()
    monkeypatch.setattr(filesystem, "os", RecordingOS("fsync", 2))
    where = quarantine(tmp_path, 1, PROBLEM)
    assert where == tmp_path / ".quarantine" / "checkpoint-00000001"
    assert (where / "manifest.json").exists()


def test_evidence_is_never_overwritten(tmp_path):
    for expected in (
        "checkpoint-00000001",
        "checkpoint-00000001~2",
        "checkpoint-00000001~3",
    ):
        shutil.rmtree(tmp_path / "checkpoint-00000001", ignore_errors=True)
        make(tmp_path, "checkpoint-00000001")
        assert quarantine(tmp_path, 1, PROBLEM).name == expected
    (tmp_path / ".quarantine" / "checkpoint-00000002").symlink_to("nowhere")
    make(tmp_path, "checkpoint-00000002")
    assert quarantine(tmp_path, 2, PROBLEM).name == "checkpoint-00000002~2"


@pytest.mark.parametrize("kind", ["symlink", "file", "fifo"])
def test_generation_that_is_no_directory_is_moved_as_it_is(tmp_path, kind):
    target = tmp_path / "elsewhere"
    target.mkdir()
    source = tmp_path / "checkpoint-00000001"
    {
        "symlink": lambda: source.symlink_to(target),
        "file": lambda: source.write_bytes(b"x"),
        "fifo": lambda: os.mkfifo(source),
    }[kind]()
    where = quarantine(tmp_path, 1, PROBLEM)
    assert where.is_symlink() == (kind == "symlink")
    assert os.listdir(target) == []


def test_generation_that_cannot_be_moved_stays_and_is_told(tmp_path, monkeypatch, caplog):
    generation = publish(tmp_path)
    monkeypatch.setattr(filesystem, "os", RecordingOS("rename"))
    assert quarantine(tmp_path, 1, PROBLEM) == generation
    assert "could not be set aside" in caplog.text
    assert generation.exists()
