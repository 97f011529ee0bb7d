# SPDX-License-Identifier: Apache-2.0
"""``mpi_ckpt.checkpoint`` in place of ``adaptdl.checkpoint``, on one rank."""

from __future__ import annotations

import inspect
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from mpi_ckpt import ArrayState, Options, checkpoint
from mpi_ckpt.errors import (
    CorruptGenerationError,
    RegistrationError,
    StageError,
    UnsupportedFormatError,
)


class Number(checkpoint.State):
    """A user's state, as adaptdl's documentation writes one."""

    def __init__(self, name: str, value: int = 0) -> None:
        super().__init__(name)
        self.value = value
        self.synced = 0

    def save(self, fileobj) -> None:
        pickle.dump(self.value, fileobj)

    def load(self, fileobj) -> None:
        self.value = pickle.load(fileobj)

    def sync(self) -> None:
        self.synced += 1


@pytest.fixture
def restart():
    """Forget everything, as the end of a process does."""
    return checkpoint.close


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch, restart):
    monkeypatch.delenv("MPI_CKPT_DIR", raising=False)
    monkeypatch.setenv("ADAPTDL_CHECKPOINT_PATH", str(tmp_path))
    restart()
    yield tmp_path
    restart()


def generations(root) -> list[str]:
    return sorted(path.name for path in root.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        ("save_all_states", "()"),
        ("save_state", "(state, checkpoint_dir, sync=True)"),
        ("load_state", "(state)"),
        ("State", "(name)"),
        ("remaining_epochs_until", "(limit)"),
        ("current_epoch", "()"),
        ("finished_epochs", "()"),
        ("Accumulator", "(*args, **kwargs)"),
    ],
)
def test_signatures_are_adaptdls(function, signature):
    found = inspect.signature(getattr(checkpoint, function))
    plain = [
        p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()
    ]
    assert str(inspect.Signature(plain)) == signature


def test_base_state_has_the_three_methods_and_does_nothing(tmp_path):
    state = checkpoint.State("nothing")
    for method, arguments in (("save", "(fileobj)"), ("load", "(fileobj)"), ("sync", "()")):
        found = inspect.signature(getattr(state, method))
        assert "(" + ", ".join(found.parameters) + ")" == arguments
    assert state.skip is False
    checkpoint.save_all_states()
    assert checkpoint.load_state(state) is True


def test_saved_state_is_loaded_by_the_next_run(restart):
    Number("a", 5)
    path = checkpoint.save_all_states()
    assert isinstance(path, str)
    assert os.path.isdir(path)
    restart()
    state = Number("a")
    assert checkpoint.load_state(state) is True
    assert state.value == 5


def test_one_run_may_save_as_often_as_it_likes(root, restart):
    state = Number("a")
    paths = []
    for value in range(6):
        state.value = value
        paths.append(checkpoint.save_all_states())
    assert len(set(paths)) == 6
    restart()  # ends the removal of old ones, which nobody waits for
    assert generations(root) == [os.path.basename(path) for path in paths[-3:]]
    state = Number("a")
    checkpoint.load_state(state)
    assert state.value == 5


def test_state_is_synced_once_per_save_and_not_by_a_load():
    state = Number("a")
    checkpoint.save_all_states()
    assert state.synced == 1
    checkpoint.load_state(state)
    assert state.synced == 1


def test_same_name_twice_is_a_value_error():
    Number("a")
    with pytest.raises(ValueError, match="'a' is given twice") as caught:
        Number("a")
    assert isinstance(caught.value, RegistrationError)
    with pytest.raises(ValueError, match="differ only in case"):
        Number("A")


@pytest.mark.parametrize("name", ["../a", "/a", "", "a/../b", "nul\0"])
def test_names_cannot_lead_out_of_the_directory(name):
    with pytest.raises(ValueError, match="state name"):
        Number(name)


def test_skipped_states_are_not_saved_but_can_be_loaded(restart):
    Number("a", 1)
    skipped = Number("b", 2)
    skipped.skip = True
    checkpoint.save_all_states()
    assert skipped.synced == 0
    restart()
    a, b = Number("a"), Number("b", 7)
    b.skip = True
    assert checkpoint.load_state(a)
    assert not checkpoint.load_state(b)
    assert b.value == 7


def test_unregistered_states_are_forgotten(restart):
    a, b = Number("a", 1), Number("b", 2)
    checkpoint.unregister(a)
    checkpoint.save_all_states()
    Number("a", 3)
    with pytest.raises(RegistrationError, match="not registered"):
        checkpoint.unregister(a)
    restart()
    assert not checkpoint.load_state(Number("a"))
    assert checkpoint.load_state(Number("b"))
    assert b.value == 2


def test_one_state_saved_alone_carries_the_others_by_link(root, restart):
    a, b = Number("a", 1), Number("b", 2)
    first = checkpoint.save_all_states()
    a.value, b.value = 10, 20
    checkpoint.save_state(a, root)
    second = root / generations(root)[-1]
    carried = second / "b.from-00000001.bin"
    assert carried.samefile(os.path.join(first, "b.bin"))
    assert (a.synced, b.synced) == (2, 1)
    restart()
    a, b = Number("a"), Number("b")
    assert checkpoint.load_state(a)
    assert checkpoint.load_state(b)
    assert (a.value, b.value) == (10, 2)


def test_one_state_can_be_saved_first_without_sync_and_elsewhere(tmp_path, restart):
    state = Number("a", 3)
    state.skip = True
    checkpoint.save_state(state, str(tmp_path / "else" / "where"), sync=False)
    assert state.synced == 0
    assert generations(tmp_path) == []
    assert not checkpoint.load_state(state)
    restart()
    checkpoint.configure(tmp_path / "else" / "where")
    os.environ.pop("ADAPTDL_CHECKPOINT_PATH")
    state = Number("a")
    assert checkpoint.load_state(state)
    assert state.value == 3


def test_nothing_to_load_is_false_and_no_error(root, monkeypatch):
    state = Number("a", 1)
    assert checkpoint.load_state(state) is False  # nothing saved
    monkeypatch.setenv("ADAPTDL_CHECKPOINT_PATH", str(root / "missing"))
    assert checkpoint.load_state(state) is False  # no such directory
    monkeypatch.delenv("ADAPTDL_CHECKPOINT_PATH")
    assert checkpoint.load_state(state) is False  # no directory given
    monkeypatch.setenv("ADAPTDL_CHECKPOINT_PATH", str(root))
    checkpoint.save_all_states()
    assert checkpoint.load_state(Number("later", 5)) is False  # was not there yet
    assert state.value == 1


def test_without_a_directory_states_are_synced_only(root, monkeypatch):
    monkeypatch.delenv("ADAPTDL_CHECKPOINT_PATH")
    state = Number("a")
    assert checkpoint.save_all_states() is None
    assert state.synced == 1
    assert generations(root) == []


def test_directory_is_found_in_the_documented_order(root, monkeypatch):
    Number("a")
    checkpoint.configure(root / "configured")
    assert "configured" not in checkpoint.save_all_states()
    monkeypatch.setenv("MPI_CKPT_DIR", str(root / "ours"))
    assert os.path.dirname(checkpoint.save_all_states()) == str(root / "ours")
    monkeypatch.delenv("MPI_CKPT_DIR")
    monkeypatch.delenv("ADAPTDL_CHECKPOINT_PATH")
    assert os.path.dirname(checkpoint.save_all_states()) == str(root / "configured")


def test_options_can_be_given(root):
    checkpoint.configure(options=Options(asynchronous=True, preemption_signals=()))
    Number("a", 1)
    assert os.path.isdir(checkpoint.save_all_states())


def test_states_of_the_library_can_be_registered(restart):
    checkpoint.register(ArrayState("arrays", {"x": np.arange(3)}))
    Number("a", 1)
    checkpoint.save_all_states()
    restart()
    state = ArrayState("arrays", {"x": np.zeros(3, int)})
    checkpoint.register(state)
    assert checkpoint.load_state(state)
    assert state.arrays["x"].tolist() == [0, 1, 2]


def test_state_that_cannot_be_saved_leaves_the_old_checkpoint(root, restart):
    state = Number("a", 1)
    checkpoint.save_all_states()
    state.value = lambda: 0
    with pytest.raises(StageError, match="'a'"):
        checkpoint.save_all_states()
    assert generations(root) == ["checkpoint-00000001"]
    assert not list(root.glob(".partial-*"))
    restart()
    state = Number("a")
    assert checkpoint.load_state(state)
    assert state.value == 1


def test_leftovers_of_a_crashed_save_are_not_committed(root, restart):
    Number("old", 1)
    crashed = root / ".partial-00000001-dead"
    crashed.mkdir()
    (crashed / "old.bin").write_bytes(b"half")
    restart()
    Number("new", 2)
    path = checkpoint.save_all_states()
    assert sorted(os.listdir(path)) == ["manifest.json", "new.bin"]
    assert not crashed.exists()


def test_stray_names_do_not_break_a_load(root, restart):
    Number("a", 4)
    checkpoint.save_all_states()
    restart()
    (root / "checkpoint-foo").mkdir()
    (root / "checkpoint-").mkdir()
    state = Number("a")
    assert checkpoint.load_state(state)
    assert state.value == 4


def test_checkpoints_of_adaptdl_are_refused_by_name_and_not_unpickled(root):
    theirs = root / "checkpoint-3"
    theirs.mkdir()
    (theirs / "a").write_bytes(pickle.dumps(print))
    with pytest.raises(UnsupportedFormatError, match=r"adaptdl .checkpoint-3."):
        checkpoint.load_state(Number("a"))
    assert theirs.exists()


def test_bad_newest_falls_back_for_all_states_alike(root, restart):
    a, b = Number("a", 1), Number("b", 1)
    checkpoint.save_all_states()
    a.value = b.value = 2
    newest = checkpoint.save_all_states()
    with open(os.path.join(newest, "b.bin"), "r+b") as file:
        file.write(b"\xff")
    restart()
    a, b = Number("a"), Number("b")
    assert checkpoint.load_state(a)
    assert checkpoint.load_state(b)
    assert (a.value, b.value) == (1, 1)
    assert os.listdir(root / ".quarantine") == ["checkpoint-00000002"]


def test_no_good_checkpoint_is_an_error_and_not_a_fresh_start(root, restart):
    Number("a", 1)
    os.truncate(os.path.join(checkpoint.save_all_states(), "a.bin"), 1)
    restart()
    with pytest.raises(CorruptGenerationError, match="no generation"):
        checkpoint.load_state(Number("a"))


def run_epochs(limit: int, stop_in: int | None = None, *, save_after_sum: bool = True):
    """Train as adaptdl's tutorial does; return what each epoch printed."""
    printed = []
    for epoch in checkpoint.remaining_epochs_until(limit):
        assert checkpoint.current_epoch() == epoch == checkpoint.finished_epochs()
        sums = checkpoint.Accumulator()
        for _ in range(3):
            sums["loss"] += epoch + 1.0
            sums["count"] += 1
        if epoch == stop_in and not save_after_sum:
            checkpoint.save_all_states()
            return printed
        with sums.synchronized():
            printed.append((epoch, sums["loss"] / sums["count"], sums["count"]))
        if epoch == stop_in:
            checkpoint.save_all_states()
            return printed
    return printed


WHOLE = [(epoch, epoch + 1.0, 3) for epoch in range(5)]


def test_epochs_and_sums_run_through():
    assert run_epochs(5) == WHOLE
    assert checkpoint.current_epoch() is None
    assert checkpoint.finished_epochs() == 5


def test_epochs_go_on_and_finished_sums_are_replayed(restart):
    assert run_epochs(5, stop_in=2) == WHOLE[:3]
    restart()
    # The running epoch is entered again, and its sum counts every batch once.
    assert run_epochs(5) == WHOLE[2:]


def test_pending_sums_are_kept_over_a_restart(restart):
    assert run_epochs(5, stop_in=2, save_after_sum=False) == WHOLE[:2]
    restart()
    # Saved in mid-epoch: a loop without a position runs its batches again, and adds.
    assert run_epochs(5) == [(2, 3.0, 6), *WHOLE[3:]]


def test_sums_of_finished_epochs_are_forgotten(restart):
    run_epochs(4)
    manifest = Path(checkpoint.save_all_states()) / "manifest.json"
    assert manifest.read_text().count("adaptdl-accumulator-epoch") == 1


def test_accumulator_is_used_as_adaptdls():
    sums = checkpoint.Accumulator({"n": 1}, m=2)
    sums["n"] += 4
    sums.update({"m": 5})
    sums.subtract({"k": 1})
    assert len(sums) == 0
    with sums.synchronized():
        assert dict(sums) == {"n": 5, "m": 7, "k": -1}
        sums.clear()
        sums["fresh"] = 3
    with sums.synchronized():
        assert dict(sums) == {"fresh": 3}
    with pytest.raises(TypeError, match="only be added to"):
        sums["n"] = 1


def test_close_forgets_states_and_directory(root):
    Number("a")
    checkpoint.configure(root / "x")
    checkpoint.close()
    Number("a")
    os.environ.pop("ADAPTDL_CHECKPOINT_PATH")
    assert checkpoint.save_all_states() is None
