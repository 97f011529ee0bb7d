# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging

from mpi_ckpt.storage.notes import Note, Notes, read_notes, remove_notes


def test_notes_are_read_back_in_their_order(tmp_path):
    notes = Notes.from_environment({"MPI_CKPT_NOTES": str(tmp_path / "notes-1")})
    notes.add("started", step=0, directory="run")
    notes.add("saved", step=5, directory="run")
    notes.add_error(ValueError("bad" * 1000), step=7, directory="run")
    started, saved, failed = read_notes(tmp_path / "notes-1")
    assert (started.event, started.directory) == ("started", "run")
    assert (saved.event, saved.step) == ("saved", 5)
    assert failed.error.startswith("ValueError: bad")
    assert len(failed.error) == 500
    assert started.writer == failed.writer != ""


def test_nothing_is_noted_unless_somebody_asks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Notes.from_environment({}).add("started")
    assert list(tmp_path.iterdir()) == []


def test_training_goes_on_where_notes_cannot_be_written(tmp_path, caplog):
    Notes(str(tmp_path / "missing" / "notes")).add("saved", step=5)
    assert "will not learn of 'saved'" in caplog.text


def test_error_without_a_text_is_noted_by_its_class(tmp_path):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    Notes(str(tmp_path / "n")).add_error(Mute())
    assert [note.error for note in read_notes(tmp_path / "n")] == ["Mute"]


def test_rubbish_and_what_is_cut_off_are_passed_over(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    lines = [
        b'{"event": "saved", "step": 3}',
        b"\xff\x00",
        b"[1]",
        b"{}",
        b'{"event": "x",',
    ]
    lines += [b"[" * 100_000, b'{"event": "saved", "step": "no"}']
    (tmp_path / "n.host-1.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "n2.host-1.jsonl").write_bytes(b'{"event": "saved"}')
    assert read_notes(tmp_path / "n") == [
        Note(event="saved", step=3, writer="n.host-1.jsonl")
    ]
    remove_notes(tmp_path / "n")
    assert [path.name for path in tmp_path.iterdir()] == ["n2.host-1.jsonl"]
