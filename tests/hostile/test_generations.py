# SPDX-License-Identifier: Apache-2.0
"""A bad newest generation: what a restore and the command line make of it."""

from __future__ import annotations

import os

import pytest

from mpi_ckpt.errors import CheckpointError, StateMismatchError
from tests.commands import run
from tests.hostile.generation_cases import CASES, FALLBACK, MISMATCH, TAKEN, Case
from tests.hostile.watch import watched
from tests.hostile.world import MARKER, NEWEST, Program, copy_of, make_root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("whole") / "root")


@pytest.fixture
def spoilt(whole, tmp_path):
    def make(case: Case):
        root = copy_of(whole, tmp_path / "root")
        case.make(root / NEWEST)
        return root

    return make


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:60])
def test_a_restore_takes_the_good_one_and_says_so(spoilt, tmp_path, caplog, case):
    root = spoilt(case)
    program = Program()
    with watched(root):
        try:
            report = program.restore(root)
        except CheckpointError as error:
            report, problem = None, error
    assert not (tmp_path / MARKER).exists()
    if case.outcome == FALLBACK:
        assert (report.generation, program.holds) == (1, 1)
        ((path, reason),) = report.quarantined.items()
        assert path == str(root / NEWEST)
        assert caplog.text.count("failed to verify and is not used") == 1
        assert len(reason) < 2000
        assert reason.replace("\n", "").isprintable()
        assert os.listdir(root / ".quarantine") == [NEWEST]
    elif case.outcome == TAKEN:
        assert report.generation == 2
        program.object.value.pop("__class__", None)
        assert program.holds == 2
    else:
        assert isinstance(problem, StateMismatchError) == (case.outcome == MISMATCH)
        assert program.holds == 0
        assert os.path.lexists(root / NEWEST)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:60])
def test_commands_tell_what_is_wrong_and_change_nothing(spoilt, tmp_path, case):
    root = spoilt(case)
    before = sorted(os.listdir(root))
    nowhere = root / "nothing is written here"
    commands = [
        ("ls", root),
        ("show", root, "2", "--structure"),
        ("diff", root, "1", "2"),
        ("export", root, "2", "--to", nowhere / "x.pt"),
        ("verify", root, "2"),
    ]
    for words in commands[:2] if case.large else commands:
        with watched(nowhere):
            answer = run(*words)
        output = answer.stdout + answer.stderr
        assert answer.exit_code in (0, 1, 2)
        assert output.replace("\n", "").isprintable()
        assert len(output) < 20_000
        if words[0] == "verify":
            assert answer.exit_code == (0 if case.verifies else 1)
    assert sorted(os.listdir(root)) == before
    assert not (tmp_path / MARKER).exists()
