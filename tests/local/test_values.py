# SPDX-License-Identifier: Apache-2.0
"""The settings of a local level."""

from __future__ import annotations

import getpass
from datetime import timedelta
from pathlib import Path

import pytest

from mpi_ckpt import Local, Options
from mpi_ckpt.engine.hosts.level import HostLevel
from mpi_ckpt.errors import OptionsError


@pytest.mark.parametrize(
    "given",
    [
        {"path": "relative/path"},
        {"every": 0},
        {"every": True},
        {"every": "often"},
        {"every": timedelta(0)},
        {"copies": 0},
        {"copies": "many"},
        {"keep": 0},
        {"reserve": -1},
        {"lost": "ignore"},
    ],
    ids=repr,
)
def test_values_out_of_range_are_refused(given):
    (name,) = given
    with pytest.raises(OptionsError, match=name):
        Local(**{"path": "/x", **given})


def test_all_faults_are_told_at_once():
    with pytest.raises(OptionsError) as caught:
        Local("x", every=0, copies=0, keep=0)
    assert len(caught.value.problems) == 4


def test_the_path_names_user_and_host():
    local = Local("/ssd/{user}/{host}")
    assert local.place("h1") == Path("/ssd", getpass.getuser(), "h1")
    assert Local(Path("/ssd")).place("h1") == Path("/ssd")


def test_domains_are_hosts_or_what_the_function_says():
    assert Local("/x").domains(["a1", "a2"]) == ("a1", "a2")
    assert Local("/x", domain=lambda host: host[0]).domains(["a1", "a2"]) == ("a", "a")


def test_ranks_compare_the_settings_but_not_a_function():
    first, other = (Local("/x", domain=lambda host: host) for _ in range(2))
    assert first.describe() == other.describe()
    assert Local("/x", every=5).describe() != Local("/x", every=6).describe()


@pytest.mark.parametrize("options", [Options(read_only=True), Options(sync=False)])
def test_options_that_contradict_it_are_refused(options):
    with pytest.raises(OptionsError, match="local="):
        HostLevel.over(Local("/x"), options, None)
