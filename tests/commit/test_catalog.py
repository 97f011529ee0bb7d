# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import shutil

import pytest

from mpi_ckpt.retention import KeepBest, KeepEvery, KeepLast
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import catalog as module
from mpi_ckpt.storage.directory.catalog import Catalog
from tests.making import Stream, publish
from tests.recording import RecordingOS


@pytest.fixture
def root(tmp_path):
    for step, loss in ((10, 0.5), (20, 0.1), (30, 0.3), (40, 0.4)):
        publish(tmp_path, [Stream("s", bytes(step))], step=step, metrics={"loss": loss})
    return tmp_path


def numbers(catalog: Catalog) -> list[int]:
    return [info.generation for info in catalog.generations()]


def test_generations_are_listed_oldest_first_with_what_their_manifests_say(root):
    found = Catalog(root).generations()
    assert [(info.generation, info.step, info.metrics) for info in found] == [
        (1, 10, {"loss": 0.5}),
        (2, 20, {"loss": 0.1}),
        (3, 30, {"loss": 0.3}),
        (4, 40, {"loss": 0.4}),
    ]
    for info in found:
        assert info.nbytes == sum(file.stat().st_size for file in info.path.iterdir())
        assert info.path.name == f"checkpoint-{info.generation:08d}"


def test_each_manifest_is_read_once_and_disk_is_the_truth(root, monkeypatch):
    read = []
    real = module.read_manifest
    monkeypatch.setattr(
        module, "read_manifest", lambda path: read.append(path.name) or real(path)
    )
    catalog = Catalog(root)
    assert numbers(catalog) == numbers(catalog) == [1, 2, 3, 4]
    assert len(read) == 4
    shutil.rmtree(root / "checkpoint-00000002")
    publish(root)
    read.clear()
    assert numbers(catalog) == [1, 3, 4, 5]
    assert read == ["checkpoint-00000005"]


def test_unreadable_generations_are_left_out_and_left_alone(root, caplog):
    (root / "checkpoint-00000002" / "manifest.json").write_bytes(b"rubbish")
    (root / "checkpoint-00000003" / "manifest.json").unlink()
    catalog = Catalog(root)
    assert numbers(catalog) == [1, 4]
    assert caplog.text.count("is left alone") == 2
    assert catalog.choose(KeepLast(1)) == (1,)
    assert (root / "checkpoint-00000002").exists()


@pytest.mark.parametrize(
    ("policy", "given_up"),
    [
        (KeepLast(2), (1, 2)),
        (KeepLast(9), ()),
        (KeepBest("loss", mode="min"), (1, 3)),
        (KeepEvery(20), (3,)),
        (KeepLast(1) | KeepBest("loss", mode="min"), (1, 3)),
    ],
)
def test_policy_chooses_what_is_given_up(root, policy, given_up):
    assert Catalog(root).choose(policy) == given_up


def test_removed_generations_are_gone(root):
    catalog = Catalog(root)
    catalog.remove((1, 3), "job")
    assert numbers(catalog) == [2, 4]
    assert sorted(name for name in os.listdir(root) if name != ".lock") == [
        "checkpoint-00000002", "checkpoint-00000004",
    ]  # fmt: skip


def test_names_are_gone_for_good_before_any_file_goes(root, monkeypatch):
    recorder = RecordingOS()
    monkeypatch.setattr(filesystem, "os", recorder)
    Catalog(root).remove((1, 2), "job")
    calls = [name for name, _ in recorder.names() if name not in ("open", "close")]
    assert calls[:3] == ["rename", "rename", "fsync"]
    assert set(calls[3:]) == {"unlink", "rmdir"}


def test_removing_nothing_touches_nothing(root, monkeypatch):
    recorder = RecordingOS()
    monkeypatch.setattr(filesystem, "os", recorder)
    Catalog(root).remove((), "job")
    assert recorder.calls == []


@pytest.mark.parametrize("call", ["rename", "fsync", "unlink", "rmdir"])
def test_trouble_removing_is_told_and_no_half_generation_is_left(
    root, monkeypatch, caplog, call
):
    catalog = Catalog(root)
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "os", RecordingOS(call))
        catalog.remove((1, 2), "job")
    assert "not all removed" in caplog.text
    for path in root.glob("checkpoint-*"):
        assert len(os.listdir(path)) == 2
    assert numbers(catalog)[-2:] == [3, 4]


def test_missing_directory_has_no_generations(tmp_path):
    assert Catalog(tmp_path / "missing").generations() == []


@pytest.fixture
def stuck(root, monkeypatch):
    """A catalog that could not remove 1 and 2, as the first rename failed."""
    catalog = Catalog(root)
    assert numbers(catalog) == [1, 2, 3, 4]
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "os", RecordingOS(fail="rename"))
        catalog.remove([1, 2], "job")
    assert numbers(catalog) == [1, 2, 3, 4]
    return catalog


def test_what_was_retired_is_spared_where_nothing_newer_is_left(stuck, root):
    for number in (3, 4):
        shutil.rmtree(root / f"checkpoint-0000000{number}")
    stuck.retry_removals("job")
    assert numbers(stuck) == [1, 2]


def refuse(_path):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.fixture
def unlisted(root, monkeypatch, caplog):
    """A catalog that could not choose, as the directory could not be listed."""
    catalog = Catalog(root)
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "list_names", refuse)
        assert catalog.choose(KeepLast(2)) == ()
    assert "retention failed" in caplog.text
    return catalog


@pytest.fixture(params=["stuck", "unlisted"])
def undone(request):
    """A catalog that could not remove 1 and 2, or not find out that they may go."""
    return request.getfixturevalue(request.param)


def test_what_could_not_be_done_is_done_before_the_next_save(undone, root):
    undone.retry_removals("job")
    assert numbers(undone) == [3, 4]
    assert sorted(os.listdir(root)) == [
        ".lock",
        "checkpoint-00000003",
        "checkpoint-00000004",
    ]
    undone.retry_removals("job")
    assert numbers(undone) == [3, 4]


def test_what_was_retired_is_spared_once_a_newer_one_is_bad(undone):
    undone.cancel_removals()
    undone.retry_removals("job")
    assert numbers(undone) == [1, 2, 3, 4]


def test_nothing_is_removed_while_the_directory_cannot_be_listed(unlisted, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "list_names", refuse)
        unlisted.retry_removals("job")
    assert numbers(unlisted) == [1, 2, 3, 4]
    unlisted.retry_removals("job")
    assert numbers(unlisted) == [3, 4]


def test_a_metric_that_no_save_ever_had_is_told_once_something_is_given_up(root, caplog):
    catalog = Catalog(root)
    assert catalog.choose(KeepLast(4) | KeepBest("accuracy", mode="max")) == ()
    assert not caplog.records  # it may come with a later save
    policy = KeepLast(1) | KeepBest("accuracy", mode="max") | KeepBest("loss", mode="min")
    assert catalog.choose(policy) == (1, 3)
    assert catalog.choose(policy) == (1, 3)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("metric='accuracy'", "mode='max'", "keeps nothing", "'loss'", str(root)):
        assert part in record.getMessage()


def test_a_metric_that_is_never_a_number_is_told_too(tmp_path, caplog):
    for step in (1, 2):
        publish(tmp_path, step=step, metrics={"loss": float("nan")})
    assert Catalog(tmp_path).choose(KeepBest("loss", mode="min")) == (1,)
    assert "keeps nothing" in caplog.text
