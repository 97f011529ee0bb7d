# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import os
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from mpi_ckpt.engine.save import draft
from mpi_ckpt.engine.sync.captured import digest_states
from mpi_ckpt.errors import RegistrationError, SaveError, StageError, WriteError
from mpi_ckpt.leaves.digest import BLOCK_BYTES, Digest
from mpi_ckpt.options import IO, Options
from mpi_ckpt.retention import KeepLast, RetentionPolicy
from mpi_ckpt.state import Capture, LeafState
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader, read_manifest
from mpi_ckpt.storage.writing import space
from tests.making import Stream, save, some_states


@pytest.fixture
def directory(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    directory.own()
    yield directory
    directory.close()


def generations(directory) -> list[str]:
    return sorted(name for name in os.listdir(directory.root) if name != ".lock")


def test_manifest_says_what_was_given(directory):
    published = save(directory, some_states(), step=7, size=3, metrics={"loss": 0.5})
    manifest = read_manifest(published.path)
    assert (manifest.generation, manifest.step, manifest.size) == (1, 7, 3)
    assert manifest.metrics == {"loss": 0.5}
    assert manifest.job == directory.job
    assert [state.name for state in manifest.states] == [
        "arrays",
        "a/b",
        "stream",
        "nothing",
    ]
    assert published.bytes_written == sum(
        f.stat().st_size for f in published.path.iterdir()
    )


def test_shard_is_a_safetensors_file_of_all_leaves(directory):
    path = save(directory, some_states()).path
    loaded = load_file(path / "rank-00000.safetensors")
    assert set(loaded) == {
        "arrays/wide", "arrays/narrow", "arrays/none", "arrays/one", "a%2Fb/seen",
    }  # fmt: skip
    assert loaded["arrays/wide"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (path / "stream.bin").read_bytes() == bytes(range(100))


def test_generation_without_states_is_one(directory):
    path = save(directory, []).path
    with GenerationReader(path) as reader:
        verify(reader)
        assert reader.manifest.states == ()
    assert os.listdir(path) == ["manifest.json"]


def test_other_states_of_an_older_generation_go_along_by_link(directory):
    first = save(directory, some_states())
    changed = ArrayState("arrays", {"x": np.ones(2)})
    second = save(directory, [changed], carry=lambda name: True)
    with GenerationReader(second.path) as reader:
        verify(reader)
        names = [state.name for state in reader.manifest.states]
        assert names == ["arrays", "a/b", "stream", "nothing"]
        assert [leaf.spec.name for leaf in reader.manifest.state("arrays").leaves] == ["x"]
        files = {file.name: file.generation for file in reader.manifest.files}
    assert files == {
        "rank-00000.safetensors": 2,
        "rank-00000.from-00000001.safetensors": 1,
        "stream.from-00000001.bin": 1,
        "nothing.from-00000001.bin": 1,
    }
    shared = second.path / "stream.from-00000001.bin"
    assert shared.samefile(first.path / "stream.bin")


def test_carried_generations_stand_alone_over_many_saves(directory):
    states = some_states()
    save(directory, states)
    for turn in range(1, 9):
        states[turn % 2 * 2] = fresh = (
            Stream("stream", bytes([turn]))
            if turn % 2
            else ArrayState("arrays", {"x": np.full(2, turn)})
        )
        save(directory, [fresh], carry=lambda name: True)
        directory.catalog.remove(directory.catalog.choose(KeepLast(1)), directory.job)
    assert generations(directory) == ["checkpoint-00000009"]
    with directory.open_newest() as reader:
        verify(reader)
        files = {file.generation for file in reader.manifest.files}
        assert files == {1, 8, 9}
        assert reader.manifest.state("nothing") is not None


def test_only_the_chosen_states_of_an_older_generation_go_along(directory):
    save(directory, [Stream(name, name.encode()) for name in "abc"])
    path = save(directory, [Stream("a", b"new")], carry=lambda name: name == "c").path
    names = ["a.bin", "c.from-00000001.bin", "manifest.json"]
    assert sorted(os.listdir(path)) == names


def test_newest_that_somebody_took_away_is_in_the_way_once_at_most(directory):
    save(directory, some_states())
    shutil.rmtree(save(directory, some_states()).path)
    fresh = [Stream("stream", b"new")]
    with pytest.raises(WriteError, match="ENOENT"):
        save(directory, fresh, carry=bool)
    with GenerationReader(save(directory, fresh, carry=bool).path) as reader:
        verify(reader)
        assert len(reader.manifest.states) == 4


def test_stream_that_replaces_a_carried_one_is_the_new_one(directory):
    save(directory, [Stream("s", b"old"), Stream("t", b"kept")])
    path = save(directory, [Stream("s", b"new")], carry=lambda name: True).path
    assert sorted(os.listdir(path)) == ["manifest.json", "s.bin", "t.from-00000001.bin"]
    assert (path / "s.bin").read_bytes() == b"new"


REUSE = Options(retention=KeepLast(100), io=IO(full_every=4))


def test_unchanged_leaves_are_shared_and_changed_ones_written(directory):
    fixed, moving = np.arange(5000.0), np.zeros(10)
    state = ArrayState("s", {"fixed": fixed, "moving": moving})
    first = save(directory, [state], options=REUSE)
    moving += 1
    second = save(directory, [state], options=REUSE)
    assert second.bytes_reused == fixed.nbytes
    assert second.bytes_written < first.bytes_written - fixed.nbytes // 2
    old = first.path / "rank-00000.safetensors"
    assert (second.path / "rank-00000.from-00000001.safetensors").samefile(old)
    with GenerationReader(second.path) as reader:
        verify(reader)
    assert (
        load_file(second.path / "rank-00000.safetensors")["s/moving"].tolist() == [1.0] * 10
    )


def test_nothing_new_is_nothing_written(directory):
    state = ArrayState("s", {"x": np.arange(5000.0)})
    save(directory, [state], options=REUSE)
    path = save(directory, [state], options=REUSE).path
    assert sorted(os.listdir(path)) == [
        "manifest.json",
        "rank-00000.from-00000001.safetensors",
    ]


@pytest.fixture
def digested(monkeypatch) -> list[int]:
    """Have every save sample first; the numbers of leaves that are digested ahead."""
    counts = []

    def note(contents, threads):
        counts.append(
            sum(len(content.leaves) for content in contents if content.digests is None)
        )
        return digest_states(contents, threads)

    monkeypatch.setattr(draft, "_SAMPLED_BYTES_MIN", 0)
    monkeypatch.setattr(draft, "digest_states", note)
    return counts


def test_digests_are_taken_ahead_only_where_a_sample_is_unchanged(directory, digested):
    leaves = {f"x{n:02d}": np.arange(100.0) for n in range(40)}
    state = ArrayState("s", leaves)
    save(directory, [state], options=REUSE)
    assert digested == []  # there is nothing to share with
    for leaf in leaves.values():
        leaf += 1
    assert save(directory, [state], options=REUSE).bytes_reused == 0
    assert digested == [8]
    leaves["x07"] += 1
    assert save(directory, [state], options=REUSE).bytes_reused == 39 * 800
    assert digested == [8, 8, 40]
    with directory.open_newest() as reader:
        verify(reader)


def test_leaf_of_several_blocks_is_digested_on_the_way(directory):
    # Ends on the border of a block, has a short last one, is empty.
    sizes = {"even": BLOCK_BYTES, "odd": 2 * BLOCK_BYTES + 5, "none": 0}
    leaves = {name: np.full(size, 7, np.uint8) for name, size in sizes.items()}
    with GenerationReader(save(directory, [ArrayState("s", leaves)]).path) as reader:
        verify(reader)
        stored = reader.manifest.state("s").leaves
        found = {leaf.spec.name: leaf.digest for leaf in stored}
    assert found == {name: Digest.of(leaf.data) for name, leaf in leaves.items()}


def test_what_can_be_shared_is_where_there_is_no_room_for_all(
    directory, digested, monkeypatch
):
    state = ArrayState("s", {f"x{n:02d}": np.arange(1000.0) + n for n in range(40)})
    save(directory, [state], options=REUSE)
    for n in range(0, 40, 2):
        state.arrays[f"x{n:02d}"] += 1
    free = space.free_space(directory.root)
    little = replace(free, nbytes=200_000)
    monkeypatch.setattr(space, "free_space", lambda _: little)
    monkeypatch.setattr(space, "_can_reserve", lambda *_: False)
    monkeypatch.setattr(draft, "_SAMPLES", 1)
    assert save(directory, [state], options=REUSE).bytes_reused == 20 * 8000
    assert digested == [40]


def test_older_generations_can_go_and_bad_blocks_do_not_live_for_ever(directory):
    state = ArrayState("s", {"x": np.arange(5000.0)})
    for _ in range(9):
        save(directory, [state], options=REUSE)
        directory.catalog.remove(directory.catalog.choose(KeepLast(1)), directory.job)
        with directory.open_newest() as reader:
            verify(reader)
            (file,) = reader.manifest.files
            assert reader.manifest.generation - file.generation < 4


def test_nothing_is_shared_where_links_fail(directory, monkeypatch):
    state = ArrayState("s", {"x": np.arange(5000.0)})
    save(directory, [state], options=REUSE)

    class NoLinks:
        def __getattr__(self, name):
            return getattr(os, name)

        def link(self, *_, **__):
            raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(filesystem, "os", NoLinks())
    published = save(directory, [state], options=REUSE)
    assert published.bytes_reused == 0
    assert sorted(os.listdir(published.path)) == ["manifest.json", "rank-00000.safetensors"]


def test_damage_to_what_would_be_shared_keeps_nobody_from_saving(directory):
    state = ArrayState("s", {"x": np.arange(5000.0)})
    os.truncate(save(directory, [state], options=REUSE).path / "manifest.json", 1)
    fresh = CheckpointDirectory(directory.root)
    directory.close()
    fresh.own()
    try:
        path = save(fresh, [state], options=REUSE).path
        with GenerationReader(path) as reader:
            verify(reader)
    finally:
        fresh.close()


def test_generations_that_retention_gives_up_are_named_and_stay(directory):
    for _ in range(3):
        published = save(directory, [], options=Options(retention=KeepLast(2)))
    assert published.retired == (1,)
    assert len(generations(directory)) == 3


def test_policy_that_fails_fails_no_save(directory, caplog):
    class Broken(RetentionPolicy):
        def keep(self, generations):
            raise ZeroDivisionError

    assert save(directory, [], options=Options(retention=Broken())).retired == ()
    assert "retention failed" in caplog.text
    assert caplog.records[-1].levelno == logging.ERROR


class Failing(Stream):
    def __init__(self, error: Exception) -> None:
        super().__init__("failing")
        self.error = error

    def save(self, fileobj) -> None:
        fileobj.write(b"some")
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("user's bug"), StageError),
        (StageError("said so"), StageError),
        (OSError(28, "No space left on device"), WriteError),
    ],
)
def test_state_that_fails_to_save_leaves_nothing(directory, error, told):
    save(directory, some_states())
    with pytest.raises(told, match=r"user's bug|said so|ENOSPC"):
        save(directory, [*some_states(), Failing(error)])
    assert generations(directory) == ["checkpoint-00000001"]


def test_state_may_write_in_any_order(directory):
    class Seeking(Stream):
        def save(self, fileobj) -> None:
            with zipfile.ZipFile(fileobj, "w") as archive:  # goes back to each header
                archive.writestr("a", b"one")
                archive.writestr("b", b"two")

    path = save(directory, [Seeking("s")]).path
    with zipfile.ZipFile(path / "s.bin") as archive:
        assert archive.read("a") + archive.read("b") == b"onetwo"
    with GenerationReader(path) as reader:
        verify(reader)


def test_state_that_misuses_its_file_is_told_and_not_the_disk(directory):
    class Misusing(Stream):
        def save(self, fileobj) -> None:
            fileobj.fileno()

    with pytest.raises(StageError, match=r"save\(\) of state 's'.*fileno"):
        save(directory, [Misusing("s")])
    assert generations(directory) == []


class Given(LeafState):
    """Captures whatever it was given."""

    def __init__(self, name: str, structure, leaves=()) -> None:
        super().__init__(name)
        self.given = structure, leaves

    def capture(self) -> Capture:
        return Capture(*self.given)


UNREADABLE = {
    "step": ([], {"step": 1.5}),
    "large step": ([], {"step": 2**63}),
    "metric": ([], {"metrics": {"loss": "low"}}),
    "metric's name": ([], {"metrics": {5: 0.5}}),
    "NaN": ([Given("s", float("nan"))], {}),
    "no JSON": ([Given("s", {1, 2})], {}),
    "surrogate": ([Given("s", "\ud800")], {}),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_no_reader_would_take_is_not_published(directory, case):
    states, noted = UNREADABLE[case]
    with pytest.raises((SaveError, ValueError, TypeError)):
        save(directory, states, **noted)
    assert generations(directory) == []


def test_numbers_of_other_libraries_are_taken_for_step_and_metrics(directory):
    path = save(directory, [], step=np.int64(5), metrics={"loss": np.float32(0.5)}).path
    manifest = read_manifest(path)
    assert (manifest.step, manifest.metrics) == (5, {"loss": 0.5})
    assert type(directory.catalog.generations()[0].step) is int


def test_carried_state_that_differs_in_case_only_is_refused(directory):
    save(directory, [Stream("Model", b"old")])
    with pytest.raises(RegistrationError, match="differ only in case"):
        save(directory, [Stream("model", b"new")], carry=lambda name: True)
    assert generations(directory) == ["checkpoint-00000001"]


def test_manifest_too_large_to_be_read_is_not_published(directory, monkeypatch):
    monkeypatch.setattr(draft, "MANIFEST_BYTES_MAX", 1000)
    monkeypatch.setattr(draft, "_WARNED_BYTES", 250)
    many = {f"x{n}": np.ones(1) for n in range(20)}
    with pytest.raises(SaveError, match=r"at most 1,000 can be read.* of state 'many'"):
        save(directory, [ArrayState("many", many), ArrayState("few", {"x": np.ones(1)})])
    assert generations(directory) == []


def test_a_manifest_that_has_grown_large_is_told_of_once(directory, monkeypatch, caplog):
    monkeypatch.setattr(draft, "_WARNED_BYTES", 1000)
    many = {f"x{n}": np.ones(1) for n in range(20)}
    for _ in range(2):
        save(directory, [ArrayState("many", many), ArrayState("few", {"x": np.ones(1)})])
    (told,) = [record.getMessage() for record in caplog.records]
    assert "a save of more than 67,108,864 is refused" in told
    assert "of state 'many'" in told
