# SPDX-License-Identifier: Apache-2.0
"""The status and the history beside the generations: lossy, and never in the way."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt import ArrayState
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.format.layout import HISTORY, STATUS
from mpi_ckpt.storage.journal import (
    HistoryEvent,
    Journal,
    read_history,
    read_status,
)


def arrays():
    return ArrayState("a", {"x": np.ones(100)})


def test_a_history_is_read_as_it_was_written(tmp_path):
    events = [
        HistoryEvent(event="fresh", time=1.0, job="j", ranks=2),
        HistoryEvent(
            event="saved", time=2.5, job="j", ranks=2, step=7, generation=1, nbytes=10,
            reused=3, seconds={"total": 1.5}, metrics={"loss": 0.25},
        ),
        HistoryEvent(event="stopped", time=3.0, reason="SIGTERM on rank 1"),
    ]  # fmt: skip
    journal = Journal(tmp_path)
    for event in events:
        journal.add(event)
    assert read_history(tmp_path) == events


def test_lines_that_are_torn_or_foreign_are_skipped(tmp_path):
    good = HistoryEvent(event="saved", time=2.5, generation=1)
    journal = Journal(tmp_path)
    journal.add(good)
    with open(tmp_path / HISTORY, "ab") as file:
        file.write(b'{"event": "saved"}\n[1]\n{"event": "moved", "time": 1}\nnull\n')
        file.write(b'{"event": "saved", "time": 1, "metrics": 3}\n\xff\n{"event": "sa')
    with open(tmp_path / HISTORY, "ab") as file:
        file.write(b"\n")
    journal.add(good)
    assert read_history(tmp_path) == [good, good]


@given(st.binary(max_size=300))
def test_no_bytes_are_too_strange_to_be_read(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("any")
    (root / HISTORY).write_bytes(data)
    (root / STATUS).write_bytes(data)
    assert isinstance(read_status(root), dict)
    assert all(isinstance(event, HistoryEvent) for event in read_history(root))


def test_a_status_replaces_the_one_before(tmp_path):
    journal = Journal(tmp_path)
    journal.show({"phase": "x" * 1000})
    journal.show({"phase": "write"})
    assert read_status(tmp_path) == {"phase": "write"}
    size = (tmp_path / STATUS).stat().st_size
    journal.show({"phase": "y" * 5000})  # too long to be written as a whole: left out
    assert read_status(tmp_path) == {"phase": "write"}
    assert (tmp_path / STATUS).stat().st_size == size


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_save_does_not_need_them(manage, tmp_path, monkeypatch, code):
    real = os.open

    def refuse(path, flags, *mode, **named):
        if os.path.basename(path) in (HISTORY, STATUS):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *mode, **named)

    class Refusing:
        def __getattr__(self, name):
            return refuse if name == "open" else getattr(os, name)

    monkeypatch.setattr(filesystem, "os", Refusing())
    manager = manage(arrays(), interval=1)
    assert manager.restore() is None
    manager.step()
    assert manager.last_save.generation == 1
    assert manager.restore().generation == 1
    manager.close()
    assert not {HISTORY, STATUS} & set(os.listdir(tmp_path))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_line_that_cannot_be_written_fails_no_save(manage, tmp_path, monkeypatch, code):
    def refuse(descriptor, data):
        raise OSError(code, os.strerror(code))

    class Refusing:
        def __getattr__(self, name):
            return refuse if name == "write" else getattr(os, name)

    monkeypatch.setattr(filesystem, "os", Refusing())
    manager = manage(arrays(), interval=1)
    manager.step()
    assert manager.last_save.generation == 1
    manager.close()
    assert read_history(tmp_path) == []
    assert read_status(tmp_path)["last_save"]["generation"] == 1


def test_links_in_their_place_are_not_followed(manage, tmp_path):
    target = tmp_path / "theirs"
    target.write_text("theirs")
    root = tmp_path / "c"
    root.mkdir()
    for name in (HISTORY, STATUS):
        (root / name).symlink_to(target)
    manager = manage(arrays(), root=root)
    manager.save()
    manager.close()
    assert target.read_text() == "theirs"


def test_pipes_in_their_place_do_not_hold_up_a_save(manage, tmp_path):
    for name in (HISTORY, STATUS):
        os.mkfifo(tmp_path / name)
    manager = manage(arrays())
    assert manager.restore() is None
    assert manager.save().generation == 1
    assert read_status(tmp_path) == {}
    assert read_history(tmp_path) == []


def test_a_job_notes_what_it_does(manage, tmp_path):
    manager = manage(arrays(), interval=10)
    manager.restore()
    manager.save(5, metrics={"loss": 0.5})
    manager.restore()
    status = read_status(tmp_path)
    assert (status["doing"], status["step"], status["ranks"]) == ("training", 5, 1)
    assert status["last_save"]["generation"] == 1
    assert status["ended"] is None
    manager.close()
    fresh, saved, restored, ended = read_history(tmp_path)
    kinds = [event.event for event in (fresh, saved, restored, ended)]
    assert kinds == ["fresh", "saved", "restored", "ended"]
    assert (saved.step, saved.generation, saved.metrics) == (5, 1, {"loss": 0.5})
    assert saved.nbytes > 800
    assert {"sync", "write", "publish", "total"} == set(saved.seconds)
    assert (restored.saved_ranks, restored.nbytes > 800) == (1, True)
    assert {event.job for event in (saved, ended)} == {status["job"]}
    assert read_status(tmp_path)["ended"] > status["updated"] - 1


def test_a_reader_leaves_nothing_behind(manage, tmp_path):
    writer = manage(arrays())
    writer.save()
    writer.close()
    before = sorted(os.listdir(tmp_path)), read_history(tmp_path)
    manager = manage(arrays(), read_only=True)
    manager.restore()
    manager.close()
    assert (sorted(os.listdir(tmp_path)), read_history(tmp_path)) == before


def test_status_holds_what_a_long_write_has_moved(manage, tmp_path, monkeypatch):
    monkeypatch.setattr("mpi_ckpt.reports._NOTICED_SECONDS", 0.0)
    seen = []
    real = filesystem.sync_file

    def look(descriptor):
        seen.append(read_status(tmp_path))
        real(descriptor)

    monkeypatch.setattr(filesystem, "sync_file", look)
    manager = manage(ArrayState("a", {"x": np.ones(1 << 18)}))
    manager.save()
    first = next(status for status in seen if status.get("bytes_done"))
    assert (first["doing"], first["phase"]) == ("saving", "write")
    assert first["bytes_done"] == first["bytes_expected"] > 1 << 21
    assert json.dumps(first)
