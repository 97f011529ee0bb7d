# SPDX-License-Identifier: Apache-2.0
"""Pinned generations stay: beside a job, in any order of events, after a crash."""

from __future__ import annotations

import os
from contextlib import closing

import numpy as np
import pytest

from mpi_ckpt import ArrayState, KeepLast
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import catalog, pins
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.format.layout import generation_name, partial_name, pin_name
from mpi_ckpt.storage.reading.reader import GenerationReader


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(pins, "_PAUSES_SECONDS", (0.0, 0.0))


def arrays():
    return ArrayState("a", {"x": np.random.default_rng(1).random(100)})


def published(root):
    return sorted(name for name in os.listdir(root) if name.startswith("checkpoint-"))


def names(*numbers):
    return [generation_name(number) for number in numbers]


def test_retention_keeps_what_is_pinned_until_it_is_unpinned(manage, tmp_path):
    manager = manage(arrays(), retention=KeepLast(1))
    manager.save()
    assert pins.pin(tmp_path, 1, "figure 3")  # beside the job, which holds the lock
    reports = [manager.save() for _ in range(3)]
    manager.wait()
    assert published(tmp_path) == names(1, 4)
    assert reports[-1].kept == 2
    assert pins.read_note(tmp_path, 1) == "figure 3"
    assert pins.unpin(tmp_path, 1)
    assert not pins.unpin(tmp_path, 1)
    manager.save()
    manager.close()
    assert published(tmp_path) == names(5)


def test_a_pin_that_comes_after_the_choice_still_counts(manage, tmp_path, monkeypatch):
    manager = manage(arrays(), retention=KeepLast(1))
    manager.save()
    real = filesystem.rename_new

    def rename(source, target):
        if source.name == generation_name(1):
            assert pins.pin(tmp_path, 1, "")
        real(source, target)

    monkeypatch.setattr(filesystem, "rename_new", rename)
    manager.save()
    manager.close()
    assert published(tmp_path) == names(1, 2)
    GenerationReader(tmp_path / generation_name(1)).close()


def test_a_pin_that_comes_too_late_says_so(manage, tmp_path, monkeypatch):
    manager = manage(arrays(), retention=KeepLast(1))
    manager.save()
    told = []
    real = catalog.is_pinned

    def look(root, number):
        found = real(root, number)
        told.append(pins.pin(tmp_path, number, ""))  # after the job has looked
        return found

    monkeypatch.setattr(catalog, "is_pinned", look)
    manager.save()
    manager.close()
    assert told == [False]
    assert published(tmp_path) == names(2)
    assert pin_name(1) not in os.listdir(tmp_path)


def test_one_who_pins_waits_for_the_job_to_rename_it_back(tmp_path, manage, monkeypatch):
    manager = manage(arrays())
    manager.save()
    manager.close()
    away = tmp_path / partial_name(1, "abc")
    os.rename(tmp_path / generation_name(1), away)
    back = iter([lambda: None, lambda: os.rename(away, tmp_path / generation_name(1))])
    monkeypatch.setattr(pins.time, "sleep", lambda _: next(back)())
    assert pins.pin(tmp_path, 1, "")


def test_a_removal_that_was_cut_off_is_undone_for_a_pinned_one(manage, tmp_path, caplog):
    manager = manage(arrays())
    manager.save()
    manager.save()
    manager.close()
    (tmp_path / pin_name(1)).touch()  # without a note, as a power cut may leave it
    os.rename(tmp_path / generation_name(1), tmp_path / partial_name(1, "abc"))
    broken = tmp_path / partial_name(7, "abc")
    broken.mkdir()
    (tmp_path / pin_name(7)).touch()
    with closing(CheckpointDirectory(tmp_path)) as directory:
        directory.own()
    assert published(tmp_path) == names(1, 2)
    assert not broken.exists()
    assert pins.read_note(tmp_path, 1) == ""
    assert "is pinned and back" in caplog.text


def test_a_pin_gets_another_note(manage, tmp_path):
    manage(arrays()).save()
    assert pins.pin(tmp_path, 1, "a" * 600)
    assert pins.read_note(tmp_path, 1) == "a" * 500
    assert pins.pin(tmp_path, 1, "short")
    assert pins.read_note(tmp_path, 1) == "short"


def test_a_pin_is_durable_when_it_is_said_to_be(manage, tmp_path, monkeypatch):
    manage(arrays()).save()
    calls = []
    for name in ("create_file", "sync_file", "sync_directory"):
        real = getattr(filesystem, name)

        def noted(*given, real=real, name=name, **named):
            calls.append(name)
            return real(*given, **named)

        monkeypatch.setattr(filesystem, name, noted)
    assert pins.pin(tmp_path, 1, "")
    assert calls == ["create_file", "sync_file", "sync_directory"]
