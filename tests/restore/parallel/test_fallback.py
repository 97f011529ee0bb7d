# SPDX-License-Identifier: Apache-2.0
"""Generations that do not verify, do not fit, are not there, or are not ours."""

import json
import os
import shutil

import numpy as np
import pytest

from mpi_ckpt import ArrayState, ObjectState, State
from mpi_ckpt.engine.restore import restoring
from mpi_ckpt.errors import (
    CorruptGenerationError,
    ReadError,
    RestoreError,
    StateMismatchError,
    UnsupportedFormatError,
)
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.options import IO
from tests.ranks import assert_same, manager, plain, same_error

SHARD = "rank-00000.safetensors"


class Stream(State):
    text = ""

    def save(self, fileobj):
        fileobj.write(self.text.encode())

    def load(self, fileobj):
        self.text = fileobj.read().decode()


class Job:
    """A few states whose contents are all one number."""

    def __init__(self):
        state = ArrayState("arrays", {name: np.zeros(1000) for name in "abc"})
        self.arrays = state.arrays
        self.object = ObjectState("object", 0)
        self.stream = Stream("stream")
        self.states = [state, self.object, self.stream]

    def set(self, number):
        for array in self.arrays.values():
            array[:] = number
        self.object.value = {"n": number, "array": np.full(100, number)}
        self.stream.text = f"{number}" * 5000

    def holds(self, number):
        return (
            all((array == number).all() for array in self.arrays.values())
            and self.object.value["n"] == number
            and (self.object.value["array"] == number).all()
            and self.stream.text == f"{number}" * 5000
        )


@pytest.fixture
def job():
    return Job()


@pytest.fixture
def saved(comm, shared_path, job):
    """A directory with generations 1, 2 and 3, of those numbers."""
    with manager(shared_path, *job.states) as checkpoints:
        for number in (1, 2, 3):
            job.set(number)
            checkpoints.save(step=10 * number)
    job.set(-1)
    return shared_path


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def rewrite(path, change):
    """Change a manifest and make its digest right again."""
    text = path.read_text()
    changed = change(text[: text.rindex(',"digest"')])
    digest = digest_bytes(changed.encode()).hex()
    path.write_text(f'{changed},"digest":"{digest}"}}\n')


DAMAGES = {
    "first byte of the header": lambda path: flip(path / SHARD, 0),
    "end of the header": lambda path: flip(path / SHARD, 4095),
    "first leaf": lambda path: flip(path / SHARD, 4096),
    "last leaf": lambda path: flip(path / SHARD, -1),
    "stream": lambda path: flip(path / "stream.bin", 77),
    "short": lambda path: os.truncate(path / SHARD, (path / SHARD).stat().st_size - 1),
    "empty": lambda path: os.truncate(path / "stream.bin", 0),
    "long": lambda path: os.truncate(path / SHARD, (path / SHARD).stat().st_size + 1),
    "no shard": lambda path: os.unlink(path / SHARD),
    "no manifest": lambda path: os.unlink(path / "manifest.json"),
    "empty manifest": lambda path: os.truncate(path / "manifest.json", 0),
    "garbage manifest": lambda path: (path / "manifest.json").write_bytes(os.urandom(500)),
    "flipped manifest": lambda path: flip(path / "manifest.json", 200),
    "another's manifest": lambda path: shutil.copy(
        path.parent / "checkpoint-00000001" / "manifest.json", path
    ),
    "shard is a directory": lambda path: (os.unlink(path / SHARD), os.mkdir(path / SHARD)),
    "shard is a link": lambda path: (
        os.rename(path / SHARD, path / "elsewhere"),
        os.symlink("elsewhere", path / SHARD),
    ),
    "only a file": lambda path: (shutil.rmtree(path), path.write_text("no directory")),
    "a leaf that claims more": lambda path: rewrite(
        path / "manifest.json", lambda text: text.replace("[1000]", "[1000000000]", 1)
    ),
}


def prune_once_open_on_root(comm, saved, monkeypatch):
    """Let the newest generation go when root has opened it, before the others do."""
    real, left = restoring.open_on_readers, [saved / "checkpoint-00000003"]

    def open_on_readers(*given):
        for path in left:
            comm.barrier()
            if comm.rank == 0:
                shutil.rmtree(path)
            comm.barrier()
        left.clear()
        return real(*given)

    monkeypatch.setattr(restoring, "open_on_readers", open_on_readers)


def test_what_is_pruned_while_it_is_opened_is_not_bad(
    comm, saved, job, monkeypatch, caplog
):
    prune_once_open_on_root(comm, saved, monkeypatch)
    with manager(saved, *job.states, io=IO(readers="all")) as checkpoints:
        report = checkpoints.restore()
        # Root alone goes on with what it has open; the others have nothing to open.
        assert report.generation == (3 if comm.size == 1 else 2)
        assert job.holds(report.generation)
        assert_same(comm, plain(report))
        assert report.quarantined == {}
    assert "failed to verify" not in caplog.text
    comm.barrier()


def test_a_pinned_generation_that_is_pruned_is_not_replaced(comm, saved, job, monkeypatch):
    with manager(saved, *job.states, io=IO(readers="all")) as checkpoints:
        checkpoints.restore(only=["object"])
        prune_once_open_on_root(comm, saved, monkeypatch)
        if comm.size == 1:
            assert checkpoints.restore(only=["arrays"]).generation == 3
        else:
            with same_error(comm, ReadError, "checkpoint-00000003"):
                checkpoints.restore(only=["arrays"])


def damage_on_root(comm, path, how):
    if comm.rank == 0:
        DAMAGES[how](path)
    comm.barrier()


@pytest.mark.parametrize("how", DAMAGES)
def test_the_older_one_is_used(comm, saved, job, how):
    bad = saved / "checkpoint-00000003"
    damage_on_root(comm, bad, how)
    with manager(saved, *job.states, io=IO(window_bytes=1)) as checkpoints:
        report = checkpoints.restore()
        assert job.holds(2)
        assert_same(comm, plain(report))
        assert (report.generation, report.step, checkpoints.steps) == (2, 20, 20)
        assert list(report.quarantined) == [str(bad)]
        assert [info.generation for info in checkpoints.generations()] == [1, 2]
        # A number that was used is not used again, whatever became of it.
        job.set(4)
        assert checkpoints.save().generation == 4
        job.set(-1)
        assert checkpoints.restore().generation == 4
        assert job.holds(4)
    if comm.rank == 0:
        aside = saved / ".quarantine" / "checkpoint-00000003"
        assert not bad.exists()
        assert aside.exists()
        if aside.is_dir():
            reason = json.loads((aside / "reason.json").read_text())
            assert reason["generation"] == 3
            assert reason["reason"] == report.quarantined[str(bad)]
            # The states hold the generation before it, and may be trained on.
            assert "mixture" not in reason["reason"]
            assert "do not train" not in reason["reason"]


def test_two_bad_ones_in_a_row(comm, saved, job):
    damage_on_root(comm, saved / "checkpoint-00000003", "last leaf")
    damage_on_root(comm, saved / "checkpoint-00000002", "no manifest")
    with manager(saved, *job.states) as checkpoints:
        report = checkpoints.restore()
    assert job.holds(1)
    assert len(report.quarantined) == 2
    with manager(saved, *job.states) as checkpoints:
        assert checkpoints.restore().quarantined == {}


def test_an_older_bad_one_is_not_looked_at(comm, saved, job):
    damage_on_root(comm, saved / "checkpoint-00000002", "last leaf")
    with manager(saved, *job.states) as checkpoints:
        assert checkpoints.restore().quarantined == {}
        assert job.holds(3)
        assert [info.generation for info in checkpoints.generations()] == [1, 2, 3]


@pytest.mark.parametrize("how", ["stream", "no shard", "garbage manifest"])
def test_none_is_good(comm, saved, job, how):
    for number in (1, 2, 3):
        damage_on_root(comm, saved / f"checkpoint-{number:08d}", how)
    with manager(saved, *job.states) as checkpoints:
        for _ in range(2):
            with same_error(
                comm,
                CorruptGenerationError,
                f"no generation in {saved} is good",
                ".quarantine",
            ) as caught:
                checkpoints.restore()
            assert len(caught.error.problems) == 3
    with manager(saved, *job.states) as checkpoints:
        with same_error(comm, CorruptGenerationError, "checkpoint-00000002"):
            checkpoints.restore()
        # It is still possible to start anew, and to go on from there.
        job.set(7)
        assert checkpoints.save().generation == 4
        job.set(-1)
        assert checkpoints.restore().generation == 4
    assert job.holds(7)


def test_root_alone_warns_once(comm, saved, job, caplog):
    damage_on_root(comm, saved / "checkpoint-00000003", "last leaf")
    with manager(saved, *job.states) as checkpoints:
        checkpoints.restore()
    warned = [r for r in caplog.records if "failed to verify" in r.getMessage()]
    assert len(warned) == (comm.rank == 0)


def test_a_bad_one_found_by_a_partial_restore(comm, saved, job):
    # The damage is in a state that is not asked for: all of them must be of one save.
    damage_on_root(comm, saved / "checkpoint-00000003", "stream")
    with manager(saved, *job.states) as checkpoints:
        report = checkpoints.restore(only=["arrays"])
        assert report.generation == 2
        assert (job.arrays["a"] == 2).all()
        assert checkpoints.restore(only=["stream", "object"]).generation == 2
        assert job.holds(2)


def test_partial_restores_use_one_generation(comm, saved, job):
    with manager(saved, *job.states) as checkpoints:
        assert checkpoints.restore(only=["arrays"]).generation == 3
        damage_on_root(comm, saved / "checkpoint-00000003", "stream")
        with same_error(comm, CorruptGenerationError, "stream.bin"):
            checkpoints.restore(only=["stream"])
        assert job.stream.text == "-1" * 5000
        # From the start again, all are of the one before.
        assert checkpoints.restore().generation == 2
        assert job.holds(2)


def test_everything_that_does_not_fit_is_listed(comm, saved, job):
    job.arrays["a"] = np.zeros(999)
    job.arrays["b"] = np.zeros(1000, "f4")
    job.arrays["d"] = job.arrays.pop("c")
    with manager(saved, *job.states) as checkpoints:
        with same_error(
            comm,
            StateMismatchError,
            "generation 3 does not fit the program, nothing was changed",
            "a F64[1000] is saved, the program has a F64[999]",
            "b F64[1000] is saved, the program has b F32[1000]",
            "c F64[1000] is saved, the program has no such leaf",
            "d F64[1000] is in the program, not in the checkpoint",
        ) as caught:
            checkpoints.restore()
        assert caught.error.generation == 3
    assert not job.arrays["b"].any()
    assert (job.arrays["d"] == -1).all()
    assert job.object.value["n"] == -1
    assert job.stream.text == "-1" * 5000
    assert comm.bcast(sorted(p.name for p in saved.glob("checkpoint-*"))) == [
        f"checkpoint-{number:08d}" for number in (1, 2, 3)
    ]


def test_what_does_not_fit_one_rank_is_told_to_all(comm, saved, job):
    last = comm.size - 1
    if comm.rank == last:
        job.arrays["a"] = np.zeros(5)
    with manager(saved, *job.states) as checkpoints:
        with same_error(
            comm, StateMismatchError, f"rank {last} of", "the program has a F64[5]"
        ):
            checkpoints.restore()
        assert (job.arrays["b"] == -1).all()
        job.arrays["a"] = np.zeros(1000)
        assert checkpoints.restore().generation == 3
    assert job.holds(3)


def test_a_state_that_became_another_kind(comm, saved, job):
    states = [ObjectState("stream", 1), Stream("arrays"), Stream("object")]
    expected = (
        "'stream' was saved as a stream",
        "'arrays' was saved as leaves",
        "'object' was saved as leaves",
    )
    with (
        manager(saved, *states) as checkpoints,
        same_error(comm, StateMismatchError, *expected),
    ):
        checkpoints.restore()
    assert states[0].value == 1
    assert [state.text for state in states[1:]] == ["", ""]


def test_states_that_are_missing_or_unexpected(comm, saved, job):
    new = ObjectState("new", "untouched")
    states = [*job.states[:2], new]
    with manager(saved, *states) as checkpoints:
        with same_error(
            comm,
            StateMismatchError,
            "state 'new' is in the program, not saved",
            "state 'stream' is saved, not in the program",
        ):
            checkpoints.restore()
        assert (job.arrays["a"] == -1).all()
    with manager(saved, *states, strict=False) as checkpoints:
        report = checkpoints.restore()
    assert (report.missing, report.unexpected) == (("new",), ("stream",))
    assert (job.arrays["a"] == 3).all()
    assert job.object.value["n"] == 3
    assert new.value == "untouched"
    assert_same(comm, plain(report))


def test_nothing_was_ever_saved(comm, shared_path, job):
    job.set(5)
    for root in (shared_path, shared_path / "not" / "there"):
        with manager(root, *job.states) as checkpoints:
            assert checkpoints.restore() is None
            assert checkpoints.restore(only=["arrays"]) is None
            assert checkpoints.generations() == []
            assert checkpoints.steps == 0
    assert job.holds(5)
    # Owned from the start: a second job must hear of the first before it trains.
    assert comm.bcast((shared_path / "not" / "there" / ".lock").exists())


def test_checkpoints_of_adaptdl_are_not_read(comm, shared_path, job):
    if comm.rank == 0:
        (shared_path / "checkpoint-3").mkdir()
        (shared_path / "checkpoint-3" / "model").write_bytes(b"a pickle")
    comm.barrier()
    with manager(shared_path, *job.states) as checkpoints:
        for _ in range(2):
            with same_error(
                comm, UnsupportedFormatError, "checkpoints of adaptdl (checkpoint-3)"
            ):
                checkpoints.restore()
        job.set(1)
        assert checkpoints.save().generation == 1
        assert checkpoints.restore().generation == 1
    assert comm.bcast((shared_path / "checkpoint-3" / "model").exists())


def test_a_newer_format_is_not_gone_behind(comm, saved, job):
    if comm.rank == 0:
        rewrite(
            saved / "checkpoint-00000003" / "manifest.json",
            lambda text: text.replace('"version":1', '"version":4'),
        )
    comm.barrier()
    with manager(saved, *job.states) as checkpoints:
        with same_error(comm, UnsupportedFormatError, "version 4", "checkpoint-00000003"):
            checkpoints.restore()
        assert job.holds(-1)
        assert [info.generation for info in checkpoints.generations()] == [1, 2]
    assert comm.bcast((saved / "checkpoint-00000003").exists())


def test_a_load_that_fails_on_one_rank(comm, saved, job):
    def load(fileobj):
        if comm.rank == comm.size - 1:
            raise RuntimeError("cannot load that here")
        Stream.load(job.stream, fileobj)

    job.stream.load = load
    with manager(saved, *job.states) as checkpoints:
        with same_error(comm, RestoreError, "cannot load that here", "mixture"):
            checkpoints.restore()
        del job.stream.load
        assert checkpoints.restore().generation == 3
    assert job.holds(3)
