# SPDX-License-Identifier: Apache-2.0
"""What a user of adaptdl.checkpoint does, on any number of ranks."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from mpi_ckpt import checkpoint
from mpi_ckpt.checkpoint import (
    Accumulator,
    State,
    current_epoch,
    finished_epochs,
    load_state,
    remaining_epochs_until,
    save_all_states,
    save_state,
)
from mpi_ckpt.errors import RegistrationError, StageError
from mpi_ckpt.storage.reading.reader import read_manifest
from tests.directories import names_in
from tests.ranks import assert_same, same_error

torch = pytest.importorskip("torch")


@pytest.fixture
def directory(comm, shared_path, monkeypatch):
    """The job's directory, as adaptdl is told of it; nothing is registered."""
    monkeypatch.delenv("MPI_CKPT_DIR", raising=False)
    monkeypatch.setenv("ADAPTDL_CHECKPOINT_PATH", str(shared_path))
    checkpoint.close()
    yield shared_path
    checkpoint.close()


@pytest.fixture
def restart(directory):
    """Ends the run: the next one makes everything anew."""
    return checkpoint.close


class Pickled(State):
    """The state of adaptdl's own documentation, with its own pickle."""

    def __init__(self, comm, name="pickled"):
        super().__init__(name)
        self.comm = comm
        self.value = {"rank": comm.rank}
        self.calls = []

    def save(self, fileobj):
        self.calls.append("save")
        pickle.dump(self.value, fileobj)

    def load(self, fileobj):
        self.calls.append("load")
        self.value = pickle.load(fileobj)

    def sync(self):
        self.calls.append("sync")
        self.value["sum"] = self.comm.allreduce(self.comm.rank + 1)


class Saved(State):
    """torch.save, which wants a file that can tell()."""

    def __init__(self, seed):
        super().__init__("saved by torch")
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(50, 40)

    def save(self, fileobj):
        torch.save(self.model.state_dict(), fileobj)

    def load(self, fileobj):
        self.model.load_state_dict(torch.load(fileobj, weights_only=True))


class Zipped(State):
    """np.savez, which wants a file that can seek, or can do without."""

    def __init__(self, value):
        super().__init__("zipped/by numpy")
        self.arrays = {"x": np.full((30, 7), value), "y": np.arange(value)}

    def save(self, fileobj):
        np.savez_compressed(fileobj, **self.arrays)

    def load(self, fileobj):
        with np.load(fileobj) as loaded:
            self.arrays = {name: loaded[name] for name in loaded}


def test_states_that_write_themselves(comm, directory, restart):
    total = comm.size * (comm.size + 1) // 2
    pickled, saved, zipped = Pickled(comm), Saved(0), Zipped(5)
    assert not load_state(pickled)
    path = save_all_states()
    assert path == (str(directory / "checkpoint-00000001") if comm.rank == 0 else None)
    assert pickled.calls == (["sync", "save"] if comm.rank == 0 else ["sync"])
    restart()
    pickled, other, again = Pickled(comm), Saved(comm.rank + 1), Zipped(9)
    assert load_state(other)
    assert load_state(pickled)
    assert load_state(again)
    assert pickled.value == {"rank": 0, "sum": total}
    for ours, theirs in zip(
        saved.model.parameters(), other.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert zipped.arrays.keys() == again.arrays.keys()
    assert all(np.array_equal(zipped.arrays[k], again.arrays[k]) for k in zipped.arrays)


def test_many_saves_and_the_last_one_counts(comm, directory, restart):
    pickled = Pickled(comm)
    for number in range(8):
        pickled.value["n"] = number
        path = save_all_states()
    assert path == (str(directory / "checkpoint-00000008") if comm.rank == 0 else None)
    pickled.value["n"] = -1
    assert load_state(pickled)
    assert pickled.value["n"] == 7
    restart()
    pickled = Pickled(comm)
    assert load_state(pickled)
    assert pickled.value["n"] == 7
    save_all_states()
    restart()  # what was given up is removed behind
    names = names_in(directory) if comm.rank == 0 else None
    kept = [f"checkpoint-{number:08d}" for number in (7, 8, 9)]
    assert comm.bcast(names) == [".lock", *kept]


def test_a_state_that_was_not_saved_before(comm, directory, restart):
    Pickled(comm)
    save_all_states()
    restart()
    pickled, new = Pickled(comm), Zipped(1)
    assert load_state(pickled)
    assert not load_state(new)
    assert new.arrays["x"][0, 0] == 1


def test_save_state_alone(comm, directory, restart):
    first, other = Pickled(comm, "one"), Pickled(comm, "other")
    save_all_states()
    first.value["n"], other.value["n"] = 1, 1
    first.calls.clear()
    save_state(first, directory)
    assert first.calls == (["sync", "save"] if comm.rank == 0 else ["sync"])
    first.value["n"] = 2
    first.calls.clear()
    save_state(first, directory, sync=False)
    assert first.calls == (["save"] if comm.rank == 0 else [])
    restart()
    first, other = Pickled(comm, "one"), Pickled(comm, "other")
    assert load_state(first)
    assert load_state(other)
    assert first.value["n"] == 2
    assert "n" not in other.value
    assert other.value["sum"] == comm.size * (comm.size + 1) // 2


def test_save_state_to_another_directory(comm, directory, restart):
    pickled = Pickled(comm)
    save_all_states()
    pickled.value["n"] = "elsewhere"
    save_state(pickled, directory / "other")
    assert load_state(pickled)
    assert "n" not in pickled.value
    restart()
    checkpoint.configure(directory / "other")
    assert load_state(Pickled(comm)), "the environment comes first"


def test_skipped_states(comm, directory, restart):
    pickled, zipped = Pickled(comm), Zipped(3)
    zipped.skip = True
    save_all_states()
    restart()
    pickled, zipped = Pickled(comm), Zipped(4)
    assert load_state(pickled)
    assert not load_state(zipped)


def test_without_a_directory_states_are_only_synced(comm, directory, monkeypatch):
    monkeypatch.delenv("ADAPTDL_CHECKPOINT_PATH")
    pickled = Pickled(comm)
    assert not load_state(pickled)
    assert save_all_states() is None
    assert pickled.calls == ["sync"]
    checkpoint.configure(directory)
    save_all_states()
    assert load_state(pickled)


def test_names_are_taken_once(comm, directory):
    Pickled(comm)
    for name in ("pickled", "Pickled", "", "../up", "/abs"):
        with pytest.raises(ValueError, match="name") as caught:
            Pickled(comm, name)
        assert isinstance(caught.value, RegistrationError)
    assert list(checkpoint._surface.states) == ["pickled"]


def test_a_save_that_fails_on_root(comm, directory, restart):
    pickled = Pickled(comm)
    save_all_states()
    pickled.value["unpicklable"] = lambda: None
    with same_error(comm, StageError, "save() of state 'pickled'"):
        save_all_states()
    del pickled.value["unpicklable"]
    pickled.value["n"] = 5
    assert load_state(pickled)
    assert "n" not in pickled.value
    save_all_states()
    restart()
    pickled = Pickled(comm)
    assert load_state(pickled)


def test_an_accumulator_sums_over_ranks(comm, directory):
    sums = Accumulator({"start": 100})
    for _ in range(3):
        sums["n"] += 1
        sums["rank"] += comm.rank
        sums["array"] -= np.ones(2)
        sums["loss"] += torch.tensor(0.5)
    assert len(sums) == 0
    with pytest.raises(TypeError):
        sums["n"] = 3
    with sums.synchronized():
        assert sums["start"] == 100
        assert sums["n"] == 3 * comm.size
        assert sums["rank"] == 3 * comm.size * (comm.size - 1) // 2
        assert sums["array"].tolist() == [-3 * comm.size] * 2
        assert sums["loss"] == 1.5 * comm.size
        sums["n"] = 0
        with sums.synchronized():
            assert sums["n"] == 0
    sums.update(n=2)
    sums.subtract({"n": 1})
    with sums.synchronized():
        assert sums["n"] == comm.size


def test_whole_mappings_are_added(comm, directory):
    sums = Accumulator()
    sums += {"loss": 0.5, "n": 2}
    sums -= {"n": 1}
    assert isinstance(sums, Accumulator)
    with sums.synchronized():
        assert dict(sums) == {"loss": 0.5 * comm.size, "n": comm.size}


def test_a_loop_over_steps_goes_on_summing(comm, directory, restart):
    for run in range(3):
        sums = Accumulator()
        for step in range(10 * run + 1, 10 * run + 11):
            sums["n"] += 1
            if step % 5 == 0:
                with sums.synchronized():
                    assert sums["n"] == step * comm.size
        save_all_states()
        restart()


def epoch_of(comm, interrupted=False):
    """Run what is left of three epochs; return what the accumulators said."""
    told = []
    for epoch in remaining_epochs_until(3):
        assert current_epoch() == epoch
        sums = Accumulator()
        for batch in range(4):
            sums["loss"] += (epoch + 1) * (comm.rank + 1)
            if interrupted and epoch == 1 and batch == 1:
                # Before the loop ends: what is pending on any rank is saved with it.
                save_all_states()
                return told
        with sums.synchronized():
            told.append((epoch, sums["loss"]))
            sums.clear()
        with sums.synchronized():
            assert dict(sums) == {}
        save_all_states()
    return told


def test_epochs_and_accumulators_over_restarts(comm, directory, restart):
    total = comm.size * (comm.size + 1) // 2
    assert epoch_of(comm, interrupted=True) == [(0, 4 * total)]
    restart()
    assert finished_epochs() == 1
    # The epoch that was cut off starts over, on top of the two batches that were saved.
    assert epoch_of(comm) == [(1, (4 + 2) * 2 * total), (2, 4 * 3 * total)]
    assert finished_epochs() == 3
    save_all_states()
    restart()
    assert epoch_of(comm) == []
    assert list(remaining_epochs_until(4)) == [3]


def test_what_was_told_is_told_again(comm, directory, restart):
    def train(stop):
        told = []
        for _ in remaining_epochs_until(1):
            sums = Accumulator()
            for number in range(3):
                sums["n"] += comm.rank + number
                with sums.synchronized():
                    told.append(sums["n"])
                if number == stop:
                    save_all_states()
                    return told
        return told

    first = train(stop=1)
    restart()
    again = train(stop=None)
    assert again[:2] == first
    assert_same(comm, again)
    assert again[2] == first[1] + comm.size * (comm.size - 1) // 2 + 2 * comm.size


def test_accumulators_of_the_same_epoch_keep_apart(comm, directory, restart):
    for _ in remaining_epochs_until(1):
        first, other = Accumulator(), Accumulator()
        first["x"] += 1
        other["x"] += 10
        save_all_states()
        break
    restart()
    for _ in remaining_epochs_until(1):
        first, other = Accumulator(), Accumulator()
        with first.synchronized(), other.synchronized():
            assert (first["x"], other["x"]) == (comm.size, 10 * comm.size)


def test_values_that_cannot_be_summed_on_one_rank(comm, directory):
    sums = Accumulator()
    sums["x"] += np.zeros(2 + (comm.rank == comm.size - 1))
    if comm.size == 1:
        sums["x"] += 0
        with sums.synchronized():
            assert sums["x"].tolist() == [0, 0, 0]
        return
    with same_error(comm, StageError, "summing accumulator"), sums.synchronized():
        pass


def test_states_made_late_still_find_what_they_saved(comm, restart):
    Pickled(comm, "early")
    Pickled(comm, "late").value["is"] = "late"
    save_all_states()
    restart()
    assert load_state(Pickled(comm, "early"))
    save_all_states()  # before "late" is made
    late = Pickled(comm, "late")
    assert load_state(late)
    assert late.value["is"] == "late"
    checkpoint.unregister(late)  # on purpose: no longer saved
    save_all_states()
    assert not load_state(Pickled(comm, "late"))


def test_sums_of_finished_epochs_are_not_taken_along(comm, restart):
    for _ in remaining_epochs_until(1):
        Accumulator()
        save_all_states()
    restart()
    for _ in remaining_epochs_until(1):  # was cut off: once more
        pass
    path = save_all_states()
    if comm.rank == 0:
        names = [state.name for state in read_manifest(Path(path)).states]
        assert names == [".adaptdl-epoch"]
