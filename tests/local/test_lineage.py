# SPDX-License-Identifier: Apache-2.0
"""The lineage of runs: written whole or not at all, and believed only if it is whole."""

from __future__ import annotations

import json

import pytest

from mpi_ckpt.errors import CheckpointError, CorruptGenerationError, FencedError, SaveError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.local.lineage import (
    LINEAGE,
    CopiedGeneration,
    Lineage,
    LocalRun,
    Origin,
    read_lineage,
    write_lineage,
)

RUNS = (
    LocalRun("r1", "j1", None, path="/local/{user}"),
    LocalRun("r2", "j2", Origin("r1", 3, 7), behind=2, settled=9, hosts=("a", "b")),
)
COPIED = (
    CopiedGeneration(7, 1796000000.123456789, Origin("r1", 3, 6)),
    CopiedGeneration(8, 1796000001.5, Origin("r1", 3, 7)),
)


def read_or_refuse(path):
    try:
        return read_lineage(path)
    except CorruptGenerationError:
        return None


def test_what_is_written_is_read(tmp_path):
    assert read_lineage(tmp_path) is None
    assert read_lineage(tmp_path / "missing") is None
    lineage = Lineage("home", RUNS, COPIED)
    write_lineage(tmp_path, lineage, "j2")
    assert read_lineage(tmp_path) == lineage
    write_lineage(tmp_path, Lineage("home"), "j3")
    assert read_lineage(tmp_path) == Lineage("home")
    assert [path.name for path in tmp_path.iterdir()] == [LINEAGE]


def test_a_run_is_entered_once_and_old_runs_fall_out():
    lineage = Lineage("home")
    for number in range(100):
        lineage = lineage.with_run(LocalRun(f"r{number}", "j", None, hosts=("a",)))
    lineage = lineage.with_run(LocalRun("r99", "j", None, settled=3, hosts=("b",)))
    assert len(lineage.runs) == 64
    assert [run.run for run in lineage.runs[-2:]] == ["r98", "r99"]
    assert [run.hosts for run in lineage.runs[-2:]] == [(), ("b",)]


def test_the_way_back_ends_where_a_run_started_afresh():
    third = LocalRun("r3", "j3", None)
    assert Lineage("home", (*RUNS, third)).limits() == {"r3": None}
    assert Lineage("home", RUNS).limits() == {"r2": None, "r1": Origin("r1", 3, 7)}
    # A generation of the directory names the job, not the run.
    after = LocalRun("r3", "j3", Origin("j2", 4, 0))
    limits = Lineage("home", (*RUNS, after)).limits()
    assert limits == {"r3": None, "r2": Origin("j2", 4, 0), "r1": Origin("r1", 3, 7)}


def test_a_copied_generation_is_told_from_another_of_its_number():
    lineage = Lineage("home", RUNS)
    for one in COPIED:
        lineage = lineage.with_copied(one)
    assert lineage.copied == COPIED
    assert lineage.source(7, COPIED[0].time) == Origin("r1", 3, 6)
    assert lineage.source(7, 1796000009.0) is None
    again = CopiedGeneration(7, 1796000002.0, Origin("r1", 4, 9))
    assert lineage.with_copied(again).copied == (COPIED[1], again)
    for number in range(100):
        lineage = lineage.with_copied(CopiedGeneration(10 + number, 1.0, Origin("r", 1, 1)))
    assert len(lineage.copied) == 64


def test_a_lineage_of_before_copies_is_read(tmp_path, monkeypatch):
    real = json.dumps

    def without_copies(values, **how):
        return real({name: one for name, one in values.items() if name != "copied"}, **how)

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", without_copies)
        write_lineage(tmp_path, Lineage("home", RUNS, COPIED), "j2")
    assert b"copied" not in (tmp_path / LINEAGE).read_bytes()
    assert read_lineage(tmp_path) == Lineage("home", RUNS)


def test_every_flipped_byte_is_found(tmp_path):
    lineage = Lineage("home", RUNS, COPIED)
    write_lineage(tmp_path, lineage, "j2")
    path = tmp_path / LINEAGE
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        # Outside of what the digest covers, blanks may change.
        assert read_or_refuse(tmp_path) in (None, lineage)
    for length in (0, 1, len(good) // 2):
        path.write_bytes(good[:length])
        with pytest.raises(CorruptGenerationError):
            read_lineage(tmp_path)


@pytest.mark.parametrize("home", ["", "a/b", "..", ".hidden"])
def test_a_home_that_leads_elsewhere_is_refused(tmp_path, home):
    write_lineage(tmp_path, Lineage(home), "j")
    with pytest.raises(CorruptGenerationError, match="no name of a folder"):
        read_lineage(tmp_path)


def test_a_job_that_was_fenced_off_changes_nothing(tmp_path):
    write_lineage(tmp_path, Lineage("home", RUNS[:1]), "j1")

    (tmp_path / ".lock").write_text("job abcdef, process 1 on elsewhere\n")
    with pytest.raises(FencedError):
        write_lineage(tmp_path, Lineage("home", RUNS), "j2")
    (tmp_path / ".lock").unlink()
    assert read_lineage(tmp_path) == Lineage("home", RUNS[:1])
    # What it has left does not stay.
    write_lineage(tmp_path, Lineage("home", RUNS), "j3")
    assert [path.name for path in tmp_path.iterdir()] == [LINEAGE]


def test_a_cut_off_write_leaves_the_old_lineage(tmp_path, monkeypatch):
    write_lineage(tmp_path, Lineage("home", RUNS[:1]), "j1")
    names = ("create_file", "write_all", "sync_file", "replace_file", "sync_directory")
    for name in names:
        with monkeypatch.context() as patch:

            def fail(*_, **__):
                raise OSError(5, "no")

            patch.setattr(filesystem, name, fail)
            with pytest.raises(SaveError):
                write_lineage(tmp_path, Lineage("home", RUNS), "j2")
        found = read_lineage(tmp_path)
        is_new = name == "sync_directory"
        assert found == Lineage("home", RUNS if is_new else RUNS[:1]), name


def test_it_can_be_read_without_the_library(tmp_path):
    write_lineage(tmp_path, Lineage("home", RUNS), "j2")
    values = json.loads((tmp_path / LINEAGE).read_text())["lineage"]
    assert [run["run"] for run in values["runs"]] == ["r1", "r2"]


def test_what_cannot_be_read_is_no_fresh_start(tmp_path):
    (tmp_path / LINEAGE).mkdir()
    with pytest.raises(CheckpointError):
        read_lineage(tmp_path)
