# SPDX-License-Identifier: Apache-2.0
"""`mpi-ckpt rescue`, here in a job of one process."""

from __future__ import annotations

import numpy as np
import pytest

from mpi_ckpt import CheckpointManager, Local, Options
from mpi_ckpt.states.arrays import ArrayState
from tests.commands import ask, run


class Crash(Exception):
    """The end of the job."""


def save(tmp_path):
    options = Options(preemption_signals=())
    local = Local(str(tmp_path / "disk"), reserve=0)
    states = [ArrayState("a", {"x": np.ones(5)})]
    with CheckpointManager(tmp_path / "run", states, options=options, local=local) as it:
        it.save(7, level="local")
        raise Crash


def test_it_copies_once_and_says_what(tmp_path):
    with pytest.raises(Crash):
        save(tmp_path)
    text = run("rescue", tmp_path / "disk", tmp_path / "run").stdout
    assert "step 7 is generation 1" in text
    assert ask("verify", tmp_path / "run")["good"] is True
    answer = ask("rescue", tmp_path / "disk", tmp_path / "run")
    assert (answer["generation"], answer["nbytes"]) == (0, 0)
    assert "all that the hosts" in run("rescue", tmp_path / "disk", tmp_path / "run").stdout


def test_a_directory_without_a_lineage_is_wrong_use(tmp_path):
    for place in ("missing", "."):
        result = run("rescue", "/local", tmp_path / place)
        assert result.exit_code == 2
        assert "no lineage.json" in result.output
    assert not (tmp_path / "missing").exists()


def test_a_relative_path_of_hosts_is_refused(tmp_path):
    with pytest.raises(Crash):
        save(tmp_path)
    result = run("rescue", "disk", tmp_path / "run")
    assert result.exit_code == 2
    assert "an absolute path" in result.output
