# SPDX-License-Identifier: Apache-2.0
"""A job that has lost its lock without knowing lives on beside its successor."""

from __future__ import annotations

import os
from contextlib import closing, suppress

import pytest

from mpi_ckpt.errors import (
    CheckpointError,
    CorruptGenerationError,
    FencedError,
    SaveError,
    WriteError,
)
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.format.layout import generation_number, partial_number
from mpi_ckpt.storage.owning import lock
from mpi_ckpt.storage.owning.lock import DirectoryLock
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.making import save, some_states
from tests.recording import RecordingOS


@pytest.fixture(autouse=True)
def lost_locks(monkeypatch):
    """Let every flock succeed, as after its holder was cut off from the file server."""
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)


@pytest.fixture
def old(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run")
    with closing(directory):
        directory.own()
        save(directory, some_states(), step=1)
        yield directory


@pytest.fixture
def new(old):
    directory = CheckpointDirectory(old.root)
    with closing(directory):
        yield directory


def generations(directory: CheckpointDirectory) -> list[int]:
    """Return the generations that are there, each proven."""
    found = sorted(recovery.survey(directory.root).generations)
    for path in sorted(directory.root.glob("checkpoint-*")):
        with GenerationReader(path) as reader:
            verify(reader)
    return found


class Interrupted(RecordingOS):
    """Lets something happen before the nth change of the file system."""

    def __init__(self, nth: int, happens) -> None:
        super().__init__()
        self.left = nth
        self._happens = happens

    def next_after(self, count: int, happens) -> None:
        """Let something else happen so many changes later."""
        self.left, self._happens = count, happens

    def _recorded(self, name, real):
        call = super()._recorded(name, real)

        def interrupted(target, *given, **named):
            self.left -= name != "close"  # not there: that would only leak it
            if self.left == 0 and name != "close":
                filesystem.os = os  # what happens now is somebody else's doing
                try:
                    self._happens()
                finally:
                    filesystem.os = self
            return call(target, *given, **named)

        return interrupted


def save_interrupted(directory, monkeypatch, nth: int, happens) -> SaveError | int | None:
    """Save; return the error or the number of the generation, None if nth is too far."""
    recorder = Interrupted(nth, happens)
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "os", recorder)
        try:
            done: SaveError | int = save(directory, some_states(), step=2).generation
        except SaveError as error:
            done = error
    return None if recorder.left > 0 else done


def test_successor_may_come_before_any_operation_of_a_save(tmp_path, monkeypatch):
    fenced = published = 0
    for nth in range(1, 200):
        old, new = (CheckpointDirectory(tmp_path / str(nth)) for _ in range(2))
        with closing(old), closing(new):
            old.own()
            save(old, some_states(), step=1)
            seen: list[int] = []

            def take_over(new=new, seen=seen):
                new.own()
                seen.extend(generations(new))

            done = save_interrupted(old, monkeypatch, nth, take_over)
            if done is None:
                break
            # What the successor did not see when it took over is never there.
            assert generations(new) == seen
            if isinstance(done, FencedError):
                fenced += 1
                assert "taken over" in str(done)
                assert seen in ([1], [1, 2])
            else:
                published += 1
                assert (done, seen) == (2, [1, 2])
            assert save(new, some_states(), step=3).generation == seen[-1] + 1
            with pytest.raises(FencedError):
                save(old, some_states(), step=4)
            assert recovery.survey(new.root).partials == ()
    assert fenced > 10
    assert published > 0


def take_over_slowly(root, monkeypatch, signs: int, sweeps: int) -> bool:
    """Sign before one operation of an old owner's save, sweep before a later one.

    Returns:
        Whether the save got so far.
    """
    seen: list[int] = []
    held: list[DirectoryLock] = []

    def sweep() -> None:
        recovery.sweep(root, recovery.survey(root).partials, "b")
        seen.extend(recovery.survey(root).generations)

    def sign() -> None:
        held.append(DirectoryLock(root, "b"))
        recorder.next_after(sweeps - signs, sweep)

    recorder = Interrupted(signs, sign)
    old = CheckpointDirectory(root)
    with closing(old), monkeypatch.context() as patch, suppress(FencedError):
        old.own()
        patch.setattr(filesystem, "os", recorder)
        save(old, [], step=2)
    for directory in held:
        if recorder.left > 0:
            sweep()  # the save ended before its time came
        directory.close()
        assert sorted(recovery.survey(root).generations) == sorted(seen)
    return bool(held)


def test_successor_may_be_slow_between_signature_and_sweep(tmp_path, monkeypatch):
    operations = 0
    while take_over_slowly(
        tmp_path / f"{operations}", monkeypatch, operations + 1, operations + 2
    ):
        operations += 1
    assert operations > 8
    for signs in range(1, operations + 1):
        for sweeps in range(signs + 2, operations + 2):
            take_over_slowly(tmp_path / f"{signs}-{sweeps}", monkeypatch, signs, sweeps)


@pytest.mark.parametrize("stops_after", range(12))
def test_sweep_that_is_under_way_leaves_nothing_to_publish_or_all(
    old, monkeypatch, stops_after
):
    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    partial = old.begin()
    partial.write_shard("rank-00000.safetensors", [memoryview(b"x" * 10)], 10)
    new = DirectoryLock(old.root, "b")
    with monkeypatch.context() as patch, suppress(Stopped):
        patch.setattr(filesystem, "os", Interrupted(stops_after, stop))
        recovery.sweep(old.root, recovery.survey(old.root).partials, "b")
    # As if it had looked at the lock before it was stopped, and went on now.
    monkeypatch.setattr(partial, "_check", lambda: None)
    target = old.root / "checkpoint-00000002"
    with suppress(CheckpointError):
        partial.publish(b"{}")
    if target.exists():
        assert {f.name for f in target.iterdir()} == {
            "rank-00000.safetensors",
            "manifest.json",
        }
    new.close()


def test_old_owner_touches_nothing_of_its_successors(old, new, caplog):
    new.own()
    begun = new.begin()
    begun.write_shard("rank-00000.safetensors", [memoryview(b"x")], 1)
    for _ in range(2):
        with pytest.raises(FencedError, match="now belongs to job"):
            save(old, some_states())
    old.remove([1])
    old.reject(1, CorruptGenerationError("bad, it says"))
    assert "nothing is removed" in caplog.text
    assert generations(new) == [1]
    assert [partial_number(name) for name in recovery.survey(old.root).partials] == [2]
    assert begun.path.joinpath("rank-00000.safetensors").read_bytes() == b"x"
    begun.drop()


def test_old_owner_that_cannot_make_its_publication_durable_leaves_it(
    old, new, monkeypatch
):
    """A successor has gone on from it: it may not be withdrawn any more."""
    partial = old.begin()
    real = filesystem.sync_directory

    def fail_after_taking_over(path, **how):
        real(path, **how)
        if path == old.root and new.owner == "":
            monkeypatch.undo()
            new.own()
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(filesystem, "sync_directory", fail_after_taking_over)
    with pytest.raises(FencedError):
        partial.publish(b"{}")
    partial.drop()
    assert generation_number("checkpoint-00000002") in recovery.survey(old.root).generations


def test_lock_file_that_is_gone_ends_the_right_to_save(old):
    (old.root / ".lock").unlink()
    with pytest.raises(FencedError, match="nobody: no lock file"):
        save(old, some_states())


def test_a_directory_that_is_gone_is_not_said_to_be_taken_over(old):
    old.root.rename(old.root.with_name("elsewhere"))
    with pytest.raises(FencedError, match="is gone: it was removed or moved away"):
        save(old, some_states())


def test_lock_file_that_cannot_be_read_fails_the_save_only(old, monkeypatch):
    def refuse(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(lock, "_read_signature", refuse)
        with pytest.raises(SaveError, match="reading the lock") as caught:
            save(old, some_states())
        assert not isinstance(caught.value, FencedError)
    assert save(old, some_states()).generation == 2


def test_owner_that_could_not_sign_does_so_before_it_saves(tmp_path, monkeypatch):
    class Full:
        full = True

        def __getattr__(self, name):
            return getattr(os, name)

        def pwrite(self, *given):
            if self.full:
                raise OSError(28, "full")
            return os.pwrite(*given)

    disk = Full()
    monkeypatch.setattr(lock, "os", disk)
    directory = CheckpointDirectory(tmp_path)
    with closing(directory):
        directory.own()
        (tmp_path / ".partial-00000001-late").mkdir()
        with pytest.raises(SaveError, match="signing the lock"):
            directory.begin()
        disk.full = False
        save(directory, some_states())
        assert recovery.survey(tmp_path).partials == ()
        assert directory.job in (tmp_path / ".lock").read_text()


def test_nothing_is_begun_in_a_directory_that_is_not_owned(tmp_path):
    with pytest.raises(SaveError, match="own"):
        CheckpointDirectory(tmp_path).begin()


def test_another_writer_of_a_job_that_was_cut_off_hears_of_it_as_root_does(old, new):
    """It wakes first, and finds that the successor has swept what it was to write into."""
    partial = old.begin()
    writer = CheckpointDirectory(old.root)
    joined = writer.join(partial.generation, old.job)
    new.own()
    refused = f"taken over from this job; it now belongs to job {new.job}"
    with pytest.raises(FencedError, match=refused):
        joined.write_shard("rank-00001.safetensors", [memoryview(b"x")], 1)
    with pytest.raises(FencedError, match=refused):
        writer.join(partial.generation, old.job)
    assert generations(new) == [1]


@pytest.mark.parametrize("signature", [None, b"", b"half a na"])
def test_another_writer_takes_no_other_trouble_for_a_take_over(old, signature):
    """Of a lock file that is gone, or not written to its end, root tells."""
    partial = old.begin()
    writer = CheckpointDirectory(old.root)
    partial.drop()
    path = old.root / ".lock"
    path.unlink()
    if signature is not None:
        path.write_bytes(signature)
    with pytest.raises(WriteError, match="this host does not see it"):
        writer.join(partial.generation, old.job)
