# SPDX-License-Identifier: Apache-2.0
"""A bad file for `mpi-ckpt import`: refused in a line, or harmless; no code is run."""

from __future__ import annotations

import os

import pytest
import torch

from tests.commands import run
from tests.hostile.import_cases import CASES
from tests.hostile.watch import watched
from tests.hostile.world import MARKER, Program, copy_of, make_root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("whole") / "root")


def says_its_states(source) -> bool:
    """Tell whether a file looks like one of export, which are given no name."""
    if not source.is_file():
        return False
    with source.open("rb") as file:
        return b"mpi_ckpt" in file.read(200)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_of_it_is_run_and_the_directory_stays_good(whole, tmp_path, case):
    root = copy_of(whole, tmp_path / "root")
    source = tmp_path / case.file
    case.make(source)
    words = ["import", source, "--into", root, "--state", "s"]
    if says_its_states(source):
        words = words[:4]
    elif case.file == "old":
        words = [*words[:4], "--trust-pickle"]
    before = set(os.listdir(root))
    with watched(root):
        answer = run(*words)
    output = answer.stdout + answer.stderr
    assert answer.exit_code == 0 if case.taken else answer.exit_code in (1, 2), output
    assert output.replace("\n", "").isprintable()
    assert len(output) < 4000
    assert not (tmp_path / MARKER).exists()
    new = set(os.listdir(root)) - before - {".lock", ".quarantine"}
    assert new == ({"checkpoint-00000003"} if case.taken else set())
    if case.taken:
        assert run("verify", root, "--all").exit_code == 0
    else:
        program = Program()
        assert program.restore(root).generation == 2
        assert program.holds == 2


def test_what_a_link_out_of_the_directory_of_adaptdl_names_is_not_taken(whole, tmp_path):
    case = next(case for case in CASES if case.name == "a link out of the directory")
    case.make(tmp_path / "old")
    answer = run("import", tmp_path / "old", "--into", tmp_path / "new", "--trust-pickle")
    assert answer.exit_code == 1
    assert "ELOOP" in answer.stderr
    assert (tmp_path / "secret").read_bytes() == b"secret"


@pytest.mark.parametrize("version", ["2.9.1", "2.5.1+cu121", "1.13.0", "who knows"])
def test_a_torch_that_files_can_make_run_code_is_not_used(tmp_path, monkeypatch, version):
    file = tmp_path / "x.pt"
    torch.save({"w": torch.ones(2)}, file)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    answer = run("import", file, "--into", tmp_path / "root")
    assert answer.exit_code == 1
    assert "upgrade to 2.10" in answer.stderr
    assert not (tmp_path / "root").exists()
