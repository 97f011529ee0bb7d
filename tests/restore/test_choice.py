# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.choice import Choice
from mpi_ckpt.errors import CorruptGenerationError, NoCheckpointError, ReadError
from mpi_ckpt.retention import GenerationSummary, KeepBest
from mpi_ckpt.storage.directory import finding
from mpi_ckpt.storage.directory.catalog import Catalog
from mpi_ckpt.storage.directory.finding import open_chosen, open_newest_there
from tests.making import publish

NAN = float("nan")
THERE = [
    GenerationSummary(2, 20, {"loss": 0.5}),
    GenerationSummary(3, 30, {"loss": 0.5, "accuracy": 1.0}),
    GenerationSummary(5, 30, {"loss": NAN}),
]


@pytest.mark.parametrize(
    ("choice", "number"),
    [
        (Choice(generation=3), 3),
        (Choice(generation=4), None),
        (Choice(step=30), 5),
        (Choice(step=31), None),
        (Choice(best="loss", mode="min"), 3),
        (Choice(best="loss", mode="max"), 3),
        (Choice(best="accuracy", mode="min"), 3),
        (Choice(best="other", mode="min"), None),
    ],
)
def test_one_is_picked_of_those_that_are_there(choice, number):
    assert choice.pick(THERE) == number


def test_two_policies_of_one_metric_tell_no_mode():
    both = KeepBest("loss", mode="min") | KeepBest("loss", mode="max")
    with pytest.raises(ValueError, match="KeepBest with mode max and min"):
        Choice(best="loss").checked(both)
    assert Choice(best="loss", mode="max").checked(both).mode == "max"


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (Choice(), "the generation of the newest"),
        (Choice(4), "generation 4"),
        (Choice(step=4), "the generation of step 4"),
        (Choice(best="loss", mode="min"), "the generation with the lowest 'loss'"),
        (Choice(best="loss"), "the generation with the best 'loss'"),
        (Choice(4, 5), "the generation of generation 4, the generation of step 5"),
        (Choice(mode="max"), "the generation of the newest"),
    ],
)
def test_it_is_told_in_words_also_where_it_makes_no_sense(choice, text):
    assert str(choice) == text


def test_the_newest_that_looks_good_is_opened_and_others_are_left(tmp_path, caplog):
    for step in (1, 2, 3):
        publish(tmp_path, step=step)
    (tmp_path / "checkpoint-00000003" / "manifest.json").write_bytes(b"rubbish")
    with open_newest_there(Catalog(tmp_path)) as reader:
        assert reader.manifest.generation == 2
    assert "generation 3 is not used" in caplog.text
    assert (tmp_path / "checkpoint-00000003").is_dir()
    for number in (1, 2):
        (tmp_path / f"checkpoint-{number:08d}" / "manifest.json").unlink()
    with pytest.raises(CorruptGenerationError, match=r"no generation in .* is good"):
        open_newest_there(Catalog(tmp_path))
    with pytest.raises(NoCheckpointError, match="holds no generation"):
        open_newest_there(Catalog(tmp_path / "other"))


def test_one_that_is_pruned_before_it_is_open_is_looked_for_again(tmp_path, monkeypatch):
    for _ in range(2):
        publish(tmp_path, step=7)
    real = finding.GenerationReader

    def prune_first(path):
        if path.name == "checkpoint-00000002":
            path.rename(tmp_path / ".partial-00000002-abc")
        return real(path)

    monkeypatch.setattr(finding, "GenerationReader", prune_first)
    with open_chosen(Catalog(tmp_path), Choice(step=7)) as reader:
        assert reader.manifest.generation == 1


def test_an_old_listing_does_not_turn_for_ever(tmp_path, monkeypatch):
    publish(tmp_path)

    def gone(path):
        raise ReadError("stale", path=path)

    monkeypatch.setattr(finding, "GenerationReader", gone)
    monkeypatch.setattr(finding, "is_gone", lambda path: True)
    with pytest.raises(ReadError, match="stale"):
        open_chosen(Catalog(tmp_path), Choice(generation=1))
