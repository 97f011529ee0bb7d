# SPDX-License-Identifier: Apache-2.0
"""The settings of a local level."""

from __future__ import annotations

import getpass
from datetime import timedelta
from pathlib import Path

import pytest

from mpi_ckpt import Local, Options
from mpi_ckpt.engine.hosts.level import HostLevel
from mpi_ckpt.engine.hosts.local_settings import LOCAL_ENVIRONMENT
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
        {"drain": 0},
        {"drain": True},
        {"drain": "fast"},
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


def test_variables_set_it():
    assert Local.from_env({"HOME": "/", "MPI_CKPT_INTERVAL": "5"}) is None
    assert Local.from_env({"MPI_CKPT_LOCAL": "/ssd/{user}"}) == Local("/ssd/{user}")
    given = {
        "MPI_CKPT_LOCAL": "/ssd",
        "MPI_CKPT_LOCAL_EVERY": "60s",
        "MPI_CKPT_LOCAL_COPIES": "all",
        "MPI_CKPT_LOCAL_KEEP": "3",
        "MPI_CKPT_LOCAL_DRAIN": "5e8",
        "MPI_CKPT_LOCAL_RESERVE": "0",
        "MPI_CKPT_LOCAL_LOST": "raise",
    }
    assert given.keys() == LOCAL_ENVIRONMENT.keys()
    every = timedelta(seconds=60)
    rest = {"copies": "all", "keep": 3, "drain": 5e8, "reserve": 0, "lost": "raise"}
    assert Local.from_env(given) == Local("/ssd", every=every, **rest)
    assert Local.from_env({**given, "MPI_CKPT_LOCAL_EVERY": "50"}).every == 50


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"MPI_CKPT_LOCAL_EVERY": "50"}, "MPI_CKPT_LOCAL, the path"),
        ({"MPI_CKPT_LOCAL": "ssd"}, "absolute path"),
        ({"MPI_CKPT_LOCAL": "/x", "MPI_CKPT_LOCAL_EVERY": "auto"}, "EVERY='auto'"),
        ({"MPI_CKPT_LOCAL": "/x", "MPI_CKPT_LOCAL_COPIES": "two"}, "COPIES='two'"),
        ({"MPI_CKPT_LOCAL": "/x", "MPI_CKPT_LOCAL_DRAIN": "-1"}, "drain is -1.0"),
    ],
)
def test_variables_that_cannot_be_used_are_refused(given, told):
    with pytest.raises(OptionsError, match=told):
        Local.from_env(given)


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
