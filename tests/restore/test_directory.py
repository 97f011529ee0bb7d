# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import closing

import pytest

from mpi_ckpt.choice import Choice
from mpi_ckpt.errors import (
    CorruptGenerationError,
    LockedError,
    OptionsError,
    ReadError,
    SaveError,
    UnsupportedFormatError,
)
from mpi_ckpt.loading import load
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import catalog, finding, recovery
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.directory.recovery import Survey
from mpi_ckpt.storage.directory.rollback import last_rolled_back, set_newer_aside
from mpi_ckpt.storage.owning import lock, ownership
from mpi_ckpt.storage.owning.ownership import Ownership
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.making import document_of, publish, save, sealed_document, some_states
from tests.recording import RecordingOS


@pytest.fixture
def opened():
    """Make directories that are closed when the test ends."""
    made = []

    def make(root) -> CheckpointDirectory:
        made.append(CheckpointDirectory(root))
        return made[-1]

    yield make
    for directory in made:
        directory.close()


def damage(generation) -> None:
    with (generation / "stream.bin").open("r+b") as file:
        file.write(b"\xff")


def newest(directory: CheckpointDirectory) -> int | None:
    reader = directory.open_newest()
    if reader is None:
        return None
    with reader:
        return reader.manifest.generation


def test_nothing_is_touched_until_it_is_asked_for(tmp_path, opened, monkeypatch):
    directory = opened(tmp_path / "new" / "root")
    assert not (tmp_path / "new").exists()
    assert newest(directory) is None
    assert os.listdir(tmp_path / "new" / "root") == [".lock"]
    # Of two jobs that start with nothing, the second hears of it before it trains.
    monkeypatch.setattr(lock.DirectoryLock.__init__, "__defaults__", (0.0,))
    with pytest.raises(LockedError):
        opened(tmp_path / "new" / "root").open_newest()


def test_owning_twice_is_owning_once_and_closing_lets_go(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(lock.DirectoryLock.__init__, "__defaults__", (0.0,))
    first, other = opened(tmp_path), opened(tmp_path)
    first.own()
    first.own()
    with pytest.raises(LockedError, match=f"job {first.job}"):
        other.own()
    first.close()
    first.close()
    other.own()


def test_leftovers_are_swept_by_the_owner(tmp_path, opened):
    leftover = tmp_path / ".partial-00000003-dead"
    leftover.mkdir()
    (leftover / "f").write_bytes(b"x")
    directory = opened(tmp_path)
    directory.own()
    assert not leftover.exists()


def test_numbers_grow_and_are_not_used_twice(tmp_path, opened):
    directory = opened(tmp_path)
    directory.own()
    assert [save(directory, []).generation for _ in range(2)] == [1, 2]
    shutil.rmtree(tmp_path / "checkpoint-00000001")
    assert save(directory, []).generation == 3
    directory.reject(3, CorruptGenerationError("bad"))
    assert save(directory, []).generation == 4


def test_newest_is_opened(tmp_path, opened):
    publish(tmp_path, step=1)
    publish(tmp_path, step=2)
    assert newest(opened(tmp_path)) == 2


def test_stray_names_are_ignored(tmp_path, opened):
    publish(tmp_path)
    (tmp_path / "checkpoint-foo").mkdir()
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "notes.txt").write_bytes(b"")
    assert newest(opened(tmp_path)) == 1


@pytest.mark.parametrize("fault", ["truncated", "missing", "manifest", "empty", "dangling"])
def test_bad_newest_is_set_aside_and_the_one_before_is_used(
    tmp_path, opened, caplog, fault
):
    publish(tmp_path, step=1)
    bad = publish(tmp_path, step=2)
    if fault == "truncated":
        os.truncate(bad / "stream.bin", 7)
    elif fault == "missing":
        (bad / "stream.bin").unlink()
    elif fault == "manifest":
        (bad / "manifest.json").write_bytes(b"{}")
    else:
        shutil.rmtree(bad)
        bad.mkdir() if fault == "empty" else bad.symlink_to("nowhere")
    directory = opened(tmp_path)
    assert newest(directory) == 1
    assert list(directory.set_aside) == [str(bad)]
    assert os.path.lexists(tmp_path / ".quarantine" / bad.name)
    assert caplog.text.count("failed to verify and is not used") == 1
    assert newest(directory) == 1


def test_generation_found_bad_later_is_not_opened_again(tmp_path, opened):
    for _ in range(2):
        publish(tmp_path)
    directory = opened(tmp_path)
    with directory.open_newest() as reader:
        damage(reader.path)
        with pytest.raises(CorruptGenerationError) as caught:
            verify(reader)
    directory.reject(2, caught.value)
    assert newest(directory) == 1


def test_all_bad_is_an_error_that_names_them_now_and_later(tmp_path, opened):
    for _ in range(2):
        os.truncate(publish(tmp_path) / "stream.bin", 7)
    directory = opened(tmp_path)
    with pytest.raises(
        CorruptGenerationError, match=r"no generation in .* is good"
    ) as caught:
        directory.open_newest()
    assert len(caught.value.problems) == 2
    directory.close()
    # The next run must not take an emptied directory for a fresh start.
    with pytest.raises(CorruptGenerationError, match="checkpoint-00000002"):
        opened(tmp_path).open_newest()


def test_start_anew_is_possible_as_the_error_says(tmp_path, opened):
    os.truncate(publish(tmp_path) / "stream.bin", 7)
    directory = opened(tmp_path)
    with pytest.raises(CorruptGenerationError, match=r"move .*\.quarantine"):
        directory.open_newest()
    directory.close()
    (tmp_path / ".quarantine").rename(tmp_path / "kept")
    assert newest(opened(tmp_path)) is None


def test_newer_format_is_an_error_and_nothing_behind_it_is_used(tmp_path, opened):
    publish(tmp_path)
    newer = publish(tmp_path)
    document = document_of(newer)
    document["version"] = 4
    (newer / "manifest.json").write_bytes(sealed_document(document))
    with pytest.raises(UnsupportedFormatError, match="version 4"):
        opened(tmp_path).open_newest()
    assert newer.exists()


def test_checkpoints_of_adaptdl_are_refused_by_name(tmp_path, opened):
    (tmp_path / "checkpoint-0").mkdir()
    (tmp_path / "checkpoint-0" / "model").write_bytes(b"\x80\x04K\x01.")
    directory = opened(tmp_path)
    with pytest.raises(UnsupportedFormatError, match=r"adaptdl .checkpoint-0."):
        directory.open_newest()
    directory.close()
    publish(tmp_path)
    assert newest(opened(tmp_path)) == 1


def test_trouble_reading_does_not_go_back_to_an_older_one(tmp_path, opened, monkeypatch):
    for _ in range(2):
        publish(tmp_path)
    directory = opened(tmp_path)

    class Failing:
        def __getattr__(self, name):
            return getattr(os, name)

        def preadv(self, *_):
            raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(filesystem, "os", Failing())
    with pytest.raises(ReadError, match="EIO"):
        directory.open_newest()
    assert directory.set_aside == {}
    assert (tmp_path / "checkpoint-00000002").exists()


class ReadOnly:
    """Refuses to make the lock file, as a read-only file system does."""

    def __init__(self, code: int) -> None:
        self.code = code

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags, *mode):
        if flags & os.O_CREAT:
            raise OSError(self.code, os.strerror(self.code), str(path))
        return os.open(path, flags, *mode)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_read_only_directory_can_be_restored_from(tmp_path, opened, monkeypatch, code):
    publish(tmp_path)
    bad = publish(tmp_path)
    os.truncate(bad / "stream.bin", 7)
    monkeypatch.setattr(lock, "os", ReadOnly(code))
    directory = opened(tmp_path)
    assert newest(directory) == 1
    assert bad.exists()
    assert list(directory.set_aside) == [str(bad)]
    assert newest(directory) == 1
    with pytest.raises(SaveError) as caught:
        directory.own()
    assert caught.value.errno == code


def assert_can_only_be_read(directory, caplog, why):
    assert newest(directory) == 1
    assert "restoring without a lock" in caplog.text
    with pytest.raises(SaveError, match=why):
        directory.own()


def test_directory_without_the_right_to_make_files_is_noticed_despite_its_lock_file(
    tmp_path, opened, monkeypatch, caplog
):
    publish(tmp_path)
    with closing(CheckpointDirectory(tmp_path)) as earlier:
        earlier.own()
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    assert_can_only_be_read(opened(tmp_path), caplog, "EACCES")


def test_directory_that_cannot_be_looked_at_is_a_read_error(tmp_path, opened):
    for name in ("x" * 300, f"checkpoint-{1:0300d}"):
        with pytest.raises(ReadError, match="ENAMETOOLONG"):
            opened(tmp_path / name).open_newest()
        with pytest.raises(ReadError, match="ENAMETOOLONG"):
            load(tmp_path / name)


def test_directory_of_a_full_disk_can_be_restored_from_with_a_warning(
    tmp_path, opened, monkeypatch, caplog
):
    publish(tmp_path)
    monkeypatch.setattr(lock, "os", ReadOnly(errno.ENOSPC))
    assert_can_only_be_read(opened(tmp_path), caplog, "ENOSPC")


def test_directory_that_must_be_writable_is_refused_at_once(tmp_path, monkeypatch):
    publish(tmp_path)
    monkeypatch.setattr(lock, "os", ReadOnly(errno.EROFS))
    with closing(
        CheckpointDirectory(tmp_path, ownership=Ownership(read_only=False))
    ) as directory:
        with pytest.raises(SaveError, match="EROFS"):
            directory.open_newest()
        with pytest.raises(SaveError, match="EROFS"):
            directory.open(Choice(generation=1))


def test_directory_that_is_only_read_is_left_as_it_is(tmp_path, opened, caplog):
    publish(tmp_path)
    opened(tmp_path).own()  # of another job: no lock is asked for
    (tmp_path / ".partial-00000003-dead").mkdir()
    before = sorted(os.listdir(tmp_path))
    with closing(
        CheckpointDirectory(tmp_path, ownership=Ownership(read_only=True))
    ) as directory:
        assert newest(directory) == 1
        with pytest.raises(OptionsError, match="read_only=True"):
            directory.own()
        damage(tmp_path / "checkpoint-00000001")
    assert sorted(os.listdir(tmp_path)) == before
    assert caplog.text == ""


def test_directory_that_is_only_read_and_not_there_is_no_fresh_start(tmp_path):
    root = tmp_path / "missing"
    reader = CheckpointDirectory(root, ownership=Ownership(read_only=True))
    with closing(reader), pytest.raises(ReadError, match="does not exist"):
        reader.open_newest()
    assert not root.exists()


@pytest.mark.parametrize("code", filesystem.NO_DIRECTORY_SYNC)
def test_file_system_without_fsync_of_directories_is_told_at_the_start(
    tmp_path, monkeypatch, caplog, code
):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with closing(CheckpointDirectory(tmp_path / "a")) as directory:
        with pytest.raises(OptionsError, match="no fsync of directories") as caught:
            directory.open_newest()
        assert caught.value.errno == code
        assert "sync_directories=False" in str(caught.value)
    without = Ownership(sync_names=False)
    for root in (tmp_path / "a", tmp_path / "made" / "now"):
        with closing(CheckpointDirectory(root, ownership=without)) as directory:
            assert newest(directory) is None
            for number in (1, 2):
                assert save(directory, some_states()).generation == number
            directory.remove([1])
            assert newest(directory) == 2
    assert caplog.text.count("has no fsync of directories: after a power cut") == 2


def test_fsync_of_a_directory_that_fails_is_not_taken_for_none(tmp_path, monkeypatch):
    without = Ownership(sync_names=False)
    with closing(CheckpointDirectory(tmp_path, ownership=without)) as directory:
        directory.own()
        monkeypatch.setattr(filesystem, "os", FailingFsync(errno.EIO))
        with pytest.raises(SaveError, match="EIO"):
            save(directory, some_states())


class FailingFsync:
    """An ``os`` whose fsync of a directory fails."""

    def __init__(self, code):
        self.code = code

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(self.code, os.strerror(self.code))
        os.fsync(descriptor)


def test_file_in_place_of_the_directory_is_told(tmp_path, opened):
    (tmp_path / "file").write_bytes(b"x")
    directory = opened(tmp_path / "file")
    with pytest.raises(SaveError, match="ENOTDIR"):
        directory.own()
    with pytest.raises(ReadError, match="ENOTDIR"):
        directory.open_newest()


def test_leftover_of_this_job_is_gone_with_its_next_save(tmp_path, opened):
    directory = opened(tmp_path)
    directory.own()
    leftover = tmp_path / f".partial-00000004-{directory.job}"
    leftover.mkdir()
    assert save(directory, []).generation == 1
    assert not leftover.exists()


def test_manifest_that_was_just_written_is_not_read_again(tmp_path, opened, monkeypatch):
    directory = opened(tmp_path)
    directory.own()
    monkeypatch.setattr(catalog, "read_manifest", lambda _: pytest.fail("read"))
    save(directory, some_states(), step=5)
    assert [info.step for info in directory.catalog.generations()] == [5]


def test_leftover_that_cannot_be_removed_is_in_nobodys_way(tmp_path, opened, monkeypatch):
    directory = opened(tmp_path)
    directory.own()
    stuck = tmp_path / ".partial-00000001-dead"
    (stuck / "theirs").mkdir(parents=True)
    (stuck / "theirs" / "f").write_bytes(b"x")
    assert save(directory, some_states()).generation == 2
    directory.close()
    assert newest(opened(tmp_path)) == 2
    assert len(list(tmp_path.glob(".partial-00000001-dead*/theirs"))) == 1


def test_manifest_of_the_newest_is_remembered_until_it_proves_bad(tmp_path, opened):
    directory = opened(tmp_path)
    directory.own()
    assert directory.newest_manifest() is None
    save(directory, some_states())
    bad = save(directory, some_states()).path
    assert directory.newest_manifest().generation == 2
    os.truncate(bad / "stream.bin", 1)
    assert directory.newest_manifest().generation == 2
    directory.reject(2, CorruptGenerationError("bad"))
    assert directory.newest_manifest().generation == 1
    directory.close()
    assert opened(tmp_path).newest_manifest().generation == 1


def test_generation_that_cannot_be_moved_is_skipped_in_this_run(
    tmp_path, opened, monkeypatch
):
    publish(tmp_path)
    bad = publish(tmp_path)
    os.truncate(bad / "stream.bin", 7)
    directory = opened(tmp_path)
    directory.own()
    monkeypatch.setattr(filesystem, "os", RecordingOS("rename"))
    assert newest(directory) == 1
    assert newest(directory) == 1
    assert bad.exists()


def reader_of(root, monkeypatch, on_open):
    """Return a directory that has not got the lock, and is told of before each opening."""

    def opening(path, **options):
        on_open(int(path.name[-8:]))
        return GenerationReader(path, **options)

    monkeypatch.setattr(finding, "GenerationReader", opening)
    directory = CheckpointDirectory(root)
    monkeypatch.setattr(directory, "own", refuse)
    return directory


def refuse():
    raise SaveError("read-only here", errno=errno.EROFS)


@pytest.mark.parametrize("fault", ["missing", "stale"])
def test_reader_takes_the_newest_again_when_one_is_pruned_under_it(
    fault, tmp_path, monkeypatch
):
    publish(tmp_path)

    def prune_the_first(number):
        if number == 1:
            publish(tmp_path)
            shutil.rmtree(tmp_path / "checkpoint-00000001")
            if fault == "stale":  # what a network file system says then
                raise ReadError("stale", errno=errno.ESTALE)

    directory = reader_of(tmp_path, monkeypatch, prune_the_first)
    with directory.open_newest() as reader:
        assert reader.manifest.generation == 2
    assert directory.set_aside == {}


def test_reader_is_told_of_a_generation_that_cannot_be_read_and_is_there(
    tmp_path, monkeypatch
):
    publish(tmp_path)

    def fail(number):
        raise ReadError("reading", errno=errno.EIO)

    with pytest.raises(ReadError, match="reading"):
        reader_of(tmp_path, monkeypatch, fail).open_newest()


def test_reader_looks_again_before_it_says_that_nothing_is_there(tmp_path, monkeypatch):
    """A listing is not taken at one moment: a rename may be missed at both its ends."""
    publish(tmp_path)
    real, lists = recovery.survey, [Survey(partials=(".partial-00000001-a",))]
    for module in (catalog, recovery):
        monkeypatch.setattr(module, "survey", lambda r: lists.pop() if lists else real(r))
    with reader_of(tmp_path, monkeypatch, lambda number: None).open_newest() as reader:
        assert reader.manifest.generation == 1
    assert lists == []


def test_a_listing_of_what_is_not_there_is_no_fresh_start(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "survey", lambda root: Survey(generations=(2, 1)))
    directory = reader_of(tmp_path, monkeypatch, lambda number: None)
    with pytest.raises(ReadError, match=r"generations \[2, 1\], but none of them exists"):
        directory.open_newest()


def test_a_retired_generation_is_kept_once_the_newer_one_is_bad(tmp_path, opened):
    """Its removal failed; it is now the only good one, until the next save is durable."""
    directory = opened(tmp_path)
    directory.own()
    save(directory, some_states())
    newer = save(directory, some_states())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filesystem, "os", RecordingOS(fail="rename"))
        directory.catalog.remove([1], directory.job)
    directory.reject(2, CorruptGenerationError("bad", path=newer.path))
    directory.begin().drop()
    assert (tmp_path / "checkpoint-00000001").is_dir()


class Lying:
    """Has the listing of a directory say something else, some times."""

    def __init__(self, monkeypatch, root, *, times: int, names=None) -> None:
        self.left = times
        real = filesystem.list_names

        def list_names(path):
            if path == root and self.left:
                self.left -= 1
                if names is None:
                    raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
                return names
            return real(path)

        monkeypatch.setattr(filesystem, "list_names", list_names)


@pytest.mark.parametrize("names", [None, [], ["checkpoint-00000001"], [".lock"]])
def test_a_listing_that_lies_once_is_looked_at_again(tmp_path, monkeypatch, opened, names):
    directory = opened(tmp_path)
    directory.own()
    for _ in range(3):
        save(directory, some_states())
    lying = Lying(monkeypatch, tmp_path, times=1, names=names)
    assert save(directory, some_states()).generation == 4
    assert lying.left == 0
    with directory.open_newest() as reader:
        assert reader.manifest.generation == 4


@pytest.mark.parametrize("names", [None, [], [".lock", "checkpoint-00000001"]])
def test_one_that_goes_on_lying_is_refused(tmp_path, monkeypatch, opened, names):
    monkeypatch.setattr(catalog, "_PAUSES_SECONDS", (0.0, 0.0))
    directory = opened(tmp_path)
    directory.own()
    for _ in range(2):
        save(directory, some_states())
    Lying(monkeypatch, tmp_path, times=100, names=names)
    with pytest.raises(SaveError, match="does not show"):
        save(directory, some_states())
    with pytest.raises(ReadError, match="does not show"):
        directory.open_newest()


@pytest.mark.parametrize("names", [[], ["checkpoint-00000001"], [".lock"]])
def test_the_first_listing_is_not_believed_alone(tmp_path, monkeypatch, opened, names):
    """Who has just come has nothing to compare it with: a job, a reader, a rollback."""
    for step in (1, 2, 3):
        publish(tmp_path, step=step)
    set_newer_aside(tmp_path, 2)
    left = tmp_path / ".partial-00000004-dead"
    left.mkdir()
    Lying(monkeypatch, tmp_path, times=1, names=names)
    with reader_of(tmp_path, monkeypatch, lambda number: None).open_newest() as reader:
        assert reader.manifest.generation == 2
    monkeypatch.undo()
    Lying(monkeypatch, tmp_path, times=1, names=names)
    assert last_rolled_back(tmp_path) == (3,)
    Lying(monkeypatch, tmp_path, times=1, names=names)
    directory = opened(tmp_path)
    directory.own()
    assert not left.exists()
    Lying(monkeypatch, tmp_path, times=1, names=names)
    assert set_newer_aside(tmp_path, 1) == (2,)


def test_the_number_of_one_that_was_set_aside_is_not_given_again(
    tmp_path, monkeypatch, opened
):
    """Also where the listing of the quarantine is empty, or it is not listed itself."""
    publish(tmp_path)
    directory = opened(tmp_path)
    directory.own()
    directory.reject(save(directory, some_states()).generation, CorruptGenerationError("x"))
    directory.close()
    for where, names in (
        (tmp_path / ".quarantine", []),
        (tmp_path, [".lock", "checkpoint-00000001"]),
    ):
        directory = opened(tmp_path)
        directory.own()
        Lying(monkeypatch, where, times=1, names=names)
        assert save(directory, some_states()).generation == 3
        shutil.rmtree(tmp_path / "checkpoint-00000003")
        directory.close()


def test_what_an_old_listing_shows_is_not_missed_for_ever(tmp_path, monkeypatch, opened):
    """Somebody has emptied the directory, and this host is shown how it was, once."""
    monkeypatch.setattr(catalog, "_PAUSES_SECONDS", (0.0,))
    directory = opened(tmp_path)
    directory.own()
    Lying(monkeypatch, tmp_path, times=1, names=[".lock", "checkpoint-00000004"])
    assert newest(directory) is None
    # The number of one that was seen is never given again.
    assert save(directory, some_states()).generation == 5


def test_a_directory_that_is_moved_away_and_back(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(catalog, "_PAUSES_SECONDS", (0.0,))
    root = tmp_path / "run"
    directory = opened(root)
    directory.own()
    save(directory, some_states())
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(SaveError):
        save(directory, some_states())
    with pytest.raises(ReadError, match="itself, though this job owns it"):
        directory.open_newest()
    (tmp_path / "elsewhere").rename(root)
    assert save(directory, some_states()).generation == 2


def test_what_somebody_has_removed_by_hand_is_no_lie(tmp_path, opened):
    directory = opened(tmp_path)
    directory.own()
    for _ in range(3):
        save(directory, some_states())
    for number in (1, 3):
        shutil.rmtree(tmp_path / f"checkpoint-0000000{number}")
    # The number of one that was seen is never given again.
    assert save(directory, some_states()).generation == 4


@pytest.mark.parametrize("target", ["nothing", "nothing/run"])
def test_a_link_to_nothing_is_no_fresh_start(tmp_path, opened, target):
    link = tmp_path / "run"
    link.symlink_to(tmp_path / target)
    with pytest.raises(ReadError, match="does not exist and cannot be made"):
        opened(link).open_newest()


def test_an_empty_mount_point_is_no_fresh_start(tmp_path, monkeypatch, opened):
    point = tmp_path / "scratch"
    point.mkdir()
    table = tmp_path / "fstab"
    table.write_text(f"# disks\nserver:/scratch {point} nfs defaults 0 0\n")
    monkeypatch.setattr(ownership, "_TABLE", table)
    with pytest.raises(ReadError, match="nothing is mounted there"):
        opened(point / "run").open_newest()
    assert list(point.iterdir()) == []
    # Whoever has made it there has meant it.
    (point / "run").mkdir()
    assert opened(point / "run").open_newest() is None


def test_mount_points_are_those_of_the_table(tmp_path, monkeypatch):
    table = tmp_path / "fstab"
    monkeypatch.setattr(ownership, "_TABLE", table)
    assert ownership.unmounted_above(tmp_path) is None
    table.write_text(f"a / ext4 x 0 0\nb {tmp_path}/with\\040space ext4 x 0 0\nshort\n")
    assert ownership.unmounted_above(tmp_path / "other") is None
    spaced = tmp_path / "with space"
    assert ownership.unmounted_above(spaced / "run") == spaced
    table.write_bytes(b"\xff\xfe")
    assert ownership.unmounted_above(spaced) is None


def test_one_look_at_a_good_generation_may_fail(tmp_path, monkeypatch, opened):
    directory = opened(tmp_path)
    directory.own()
    save(directory, some_states())
    real, left = filesystem.open_for_reading, [1]

    def once(path, **how):
        if left and path.name == "manifest.json":
            left.pop()
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return real(path, **how)

    monkeypatch.setattr(filesystem, "open_for_reading", once)
    directory.forget_newest()
    with directory.open_newest() as reader:
        assert reader.manifest.generation == 1
    assert not left
    assert directory.set_aside == {}


@pytest.mark.parametrize("listed", [True, False])
def test_a_file_that_is_listed_and_not_there_is_no_reason_to_give_up(
    tmp_path, monkeypatch, opened, listed
):
    """A host that sees an old state for long must not have good generations set aside."""
    directory = opened(tmp_path)
    directory.own()
    good = save(directory, some_states()).path
    real, real_list = filesystem.open_for_reading, filesystem.list_names

    def never(path, **how):
        if path.parent == good:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return real(path, **how)

    def unlisted(path):
        if path == good:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return real_list(path)

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "open_for_reading", never)
        if not listed:
            patch.setattr(filesystem, "list_names", unlisted)
        directory.forget_newest()
        with pytest.raises(ReadError, match="ENOENT"):
            directory.open_newest()
    assert newest(directory) == 1
    assert directory.set_aside == {}
    # One that is not listed is missing.
    (good / "stream.bin").unlink()
    with pytest.raises(CorruptGenerationError, match="no generation in"):
        directory.open_newest()


def test_a_leftover_that_is_said_not_to_be_there_is_swept_next(
    tmp_path, monkeypatch, opened
):
    left = tmp_path / ".partial-00000003-dead"
    left.mkdir()
    real = filesystem.rename_new

    def absent(source, target):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(source))

    directory = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "rename_new", absent)
        directory.own()
    assert left.exists()
    assert filesystem.rename_new is real
    save(directory, some_states())
    assert not left.exists()


@pytest.mark.parametrize("kind", ["copy", "link"])
def test_a_link_that_is_no_second_name_is_noticed(tmp_path, monkeypatch, kind):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x")
    make = shutil.copy if kind == "copy" else os.symlink
    monkeypatch.setattr(
        filesystem.os, "link", lambda source, other, follow_symlinks: make(source, other)
    )
    with pytest.raises(OSError, match="no second names"):
        filesystem.link_file(source, target)
    assert not os.path.lexists(target)
    assert source.read_bytes() == b"x"


def test_a_link_that_fails_and_is_there_all_the_same_is_in_nobodys_way(
    tmp_path, monkeypatch
):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x")

    def make(source, other, follow_symlinks):
        os.symlink(source, other)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(source), None, str(other))

    monkeypatch.setattr(filesystem.os, "link", make)
    with pytest.raises(OSError, match="Input/output error"):
        filesystem.link_file(source, target)
    assert not os.path.lexists(target)
    # What was there before is somebody's.
    target.write_bytes(b"y")
    monkeypatch.undo()
    with pytest.raises(FileExistsError):
        filesystem.link_file(source, target)
    assert target.read_bytes() == b"y"
