# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mpi_ckpt.storage import filesystem
from tests.recording import RecordingOS


@pytest.fixture
def calls(monkeypatch) -> RecordingOS:
    recorder = RecordingOS()
    monkeypatch.setattr(filesystem, "os", recorder)
    return recorder


def test_file_is_made_once_and_never_through_a_link(tmp_path):
    with filesystem.create_file(tmp_path / "f") as descriptor:
        filesystem.write_all(descriptor, b"abc", 0)
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    for name in ("f", "dangling", "link"):
        with pytest.raises(FileExistsError), filesystem.create_file(tmp_path / name):
            pytest.fail("made")
    assert (tmp_path / "f").read_bytes() == b"abc"
    assert not (tmp_path / "elsewhere").exists()


def test_file_is_closed_when_its_writer_fails(tmp_path):
    with pytest.raises(KeyError), filesystem.create_file(tmp_path / "f") as descriptor:
        raise KeyError
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)


def test_writes_go_where_they_belong(tmp_path):
    with filesystem.create_file(tmp_path / "f") as descriptor:
        filesystem.write_all(descriptor, memoryview(b"def"), 3)
        filesystem.write_all(descriptor, b"abc", 0)
        filesystem.write_all(descriptor, b"", 100)
        filesystem.write_all(descriptor, memoryview(bytes(range(8))).cast("I"), 6)
    assert (tmp_path / "f").read_bytes() == b"abcdef" + bytes(range(8))


@pytest.mark.parametrize("most", [1, 3, 7])
def test_short_writes_and_reads_are_continued(tmp_path, monkeypatch, most):
    class Short:
        def __getattr__(self, name):
            return getattr(os, name)

        def pwrite(self, descriptor, data, offset):
            return os.pwrite(descriptor, data[:most], offset)

        def preadv(self, descriptor, buffers, offset):
            return os.preadv(descriptor, [buffers[0][:most]], offset)

    monkeypatch.setattr(filesystem, "os", Short())
    data = bytes(range(20))
    with filesystem.create_file(tmp_path / "f") as descriptor:
        filesystem.write_all(descriptor, data, 0)
    into = bytearray(30)
    with filesystem.open_for_reading(tmp_path / "f") as (descriptor, nbytes):
        assert nbytes == 20
        assert filesystem.read_at(descriptor, memoryview(into), 5) == 15
    assert bytes(into[:15]) == data[5:]


def test_no_call_asks_for_more_than_the_system_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem, "_CALL_BYTES", 4)
    asked = []

    class Watching:
        def __getattr__(self, name):
            return getattr(os, name)

        def pwrite(self, descriptor, data, offset):
            asked.append(len(data))
            return os.pwrite(descriptor, data, offset)

    monkeypatch.setattr(filesystem, "os", Watching())
    with filesystem.create_file(tmp_path / "f") as descriptor:
        filesystem.write_all(descriptor, bytes(10), 0)
    assert asked == [4, 4, 2]


def test_file_system_that_takes_no_bytes_is_an_error_and_no_hang(tmp_path, monkeypatch):
    class Full:
        def __getattr__(self, name):
            return getattr(os, name)

        def pwrite(self, *_):
            return 0

    monkeypatch.setattr(filesystem, "os", Full())
    with filesystem.create_file(tmp_path / "f") as descriptor:
        filesystem.write_all(descriptor, b"", 0)
        with pytest.raises(OSError, match="no more bytes") as caught:
            filesystem.write_all(descriptor, b"x", 0)
    assert caught.value.errno == errno.EIO


def test_read_stops_at_the_end(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    into = memoryview(bytearray(5))
    with filesystem.open_for_reading(tmp_path / "f") as (descriptor, _):
        assert filesystem.read_at(descriptor, into, 1) == 2
        assert filesystem.read_at(descriptor, into, 3) == 0
        assert filesystem.read_at(descriptor, into, 99) == 0
        assert filesystem.read_at(descriptor, into[:0], 0) == 0
    assert bytes(into) == b"bc\0\0\0"


@pytest.mark.parametrize("most", [0, 5, 1000, 1 << 21])
@pytest.mark.parametrize("nbytes", [0, 5, 3 << 20])
def test_the_start_of_a_file_is_read_whatever_its_size_is_said_to_be(
    tmp_path, nbytes, most
):
    data = os.urandom(nbytes)
    (tmp_path / "file").write_bytes(data)
    assert filesystem.read_start(tmp_path / "file", most) == data[:most]
    told = filesystem.read_start(Path("/proc/self/status"), most)  # of no size at all
    assert b"Name:"[:most] == told[:5]


def test_only_regular_files_are_opened_and_nothing_blocks(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with (
            pytest.raises(ValueError, match="not a regular file"),
            filesystem.open_for_reading(path),
        ):
            pytest.fail("opened")
    with (
        pytest.raises(OSError, match="symbolic") as caught,
        filesystem.open_for_reading(tmp_path / "link"),
    ):
        pytest.fail("opened")
    assert caught.value.errno == errno.ELOOP


def test_rename_takes_free_names_only(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("empty", "file", "dangling"):
        with pytest.raises(FileExistsError):
            filesystem.rename_new(source, tmp_path / name)
    filesystem.rename_new(source, tmp_path / "target")
    assert (tmp_path / "target" / "f").exists()
    assert not source.exists()


def test_link_is_a_second_name_and_never_follows(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    filesystem.link_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")
    (tmp_path / "link").symlink_to("a")
    filesystem.link_file(tmp_path / "link", tmp_path / "c")
    assert (tmp_path / "c").is_symlink()
    with pytest.raises(FileExistsError):
        filesystem.link_file(tmp_path / "a", tmp_path / "b")


def test_tree_is_removed_without_following_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"x")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"x")
    (tree / "to_file").symlink_to(outside / "kept")
    (tree / "to_directory").symlink_to(outside)
    (tree / "empty").mkdir()
    os.mkfifo(tree / "fifo")
    filesystem.remove_tree(tree)
    assert not tree.exists()
    assert (outside / "kept").exists()


def test_tree_that_is_a_link_or_a_file_is_unlinked(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "file").write_bytes(b"x")
    for name in ("link", "file", "missing"):
        filesystem.remove_tree(tmp_path / name)
    assert os.listdir(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "f").exists()


def test_deep_trees_are_not_ours_and_stay(tmp_path):
    deep = tmp_path / "tree" / "theirs"
    deep.mkdir(parents=True)
    (deep / "data").write_bytes(b"x")
    with pytest.raises(OSError, match="not empty"):
        filesystem.remove_tree(tmp_path / "tree")
    assert (deep / "data").exists()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_space_is_claimed_where_the_file_system_can(tmp_path, calls, code):
    calls.fail, calls.nth, calls.code = "posix_fallocate", 2, code
    with filesystem.create_file(tmp_path / "f") as descriptor:
        filesystem.reserve(descriptor, 10_000)
        filesystem.reserve(descriptor, 20_000)
        filesystem.set_length(descriptor, 5)
    assert calls.fired
    assert (tmp_path / "f").read_bytes() == bytes(5)


def test_full_disk_is_told_when_space_is_claimed(tmp_path, calls):
    calls.fail, calls.code = "posix_fallocate", errno.ENOSPC
    with (
        filesystem.create_file(tmp_path / "f") as descriptor,
        pytest.raises(OSError, match="space"),
    ):
        filesystem.reserve(descriptor, 10)


def test_writing_out_early_is_only_a_hint(tmp_path, monkeypatch):
    class Refusing:
        def __getattr__(self, name):
            return getattr(os, name)

        def posix_fadvise(self, *_):
            raise OSError(errno.EINVAL, "no")

    with filesystem.create_file(tmp_path / "f") as descriptor:
        filesystem.write_all(descriptor, b"abc", 0)
        filesystem.start_writeback(descriptor, 0, 3)
        monkeypatch.setattr(filesystem, "os", Refusing())
        filesystem.start_writeback(descriptor, 0, 3)
    assert (tmp_path / "f").read_bytes() == b"abc"


def test_names_are_sorted(tmp_path):
    for name in "bca":
        (tmp_path / name).mkdir()
    assert filesystem.list_names(tmp_path) == ["a", "b", "c"]


def test_every_directory_made_is_durable_before_the_next(tmp_path, calls):
    filesystem.make_directories(tmp_path / "a" / "b")
    changes = [(name, path) for name, path in calls.calls if name in ("mkdir", "fsync")]
    root = str(tmp_path)
    made = [(n, p.removeprefix(root)) for n, p in changes if p.startswith(root)]
    assert made == [("mkdir", "/a"), ("fsync", ""), ("mkdir", "/a/b"), ("fsync", "/a")]
    assert (tmp_path / "a" / "b").is_dir()


def test_directories_that_are_there_are_fine(tmp_path):
    filesystem.make_directories(tmp_path)
    filesystem.make_directories(tmp_path / "x")
    filesystem.make_directories(tmp_path / "x")
    with pytest.raises(FileExistsError):
        filesystem.make_directory(tmp_path / "x")


def test_directory_is_fsynced_and_closed_also_when_that_fails(tmp_path, calls):
    filesystem.sync_directory(tmp_path)
    assert [name for name, _ in calls.calls] == ["open", "fsync", "close"]
    calls.fail, calls.nth = "fsync", 1
    with pytest.raises(OSError, match="Input/output"):
        filesystem.sync_directory(tmp_path)
    assert calls.calls[-1][0] == "close"
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        filesystem.sync_directory(tmp_path / "f")


def test_files_of_many_ranks_are_removed_together(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(5 * filesystem.REMOVERS):
        (tree / f"{number}").touch()
    (tree / "directory").mkdir()
    real = filesystem.list_names
    monkeypatch.setattr(filesystem, "list_names", lambda path: [*real(path), "gone"])
    filesystem.remove_tree(tree)
    assert not tree.exists()


def test_a_file_among_many_that_cannot_be_removed_is_an_error(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(5 * filesystem.REMOVERS):
        (tree / f"{number}").touch()
    real = os.unlink

    def refusing(path):
        if path.name == "7":
            raise PermissionError(errno.EPERM, "no")
        real(path)

    monkeypatch.setattr(os, "unlink", refusing)
    with pytest.raises(PermissionError):
        filesystem.remove_tree(tree)
    assert "7" in [path.name for path in tree.iterdir()]
