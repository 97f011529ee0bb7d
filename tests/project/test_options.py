# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
import signal
from datetime import timedelta

import pytest

from mpi_ckpt.errors import OptionsError
from mpi_ckpt.options import ENVIRONMENT, IO, Options, StopWhen
from mpi_ckpt.pacing import AutoInterval
from mpi_ckpt.retention import KeepEvery, KeepLast


def test_defaults_are_usable_and_few():
    options = Options()
    assert options.retention == KeepLast(3)
    assert options.stop.exit_code == 143
    assert options.io.readers == options.writers == "root"
    assert signal.SIGTERM in options.preemption_signals
    assert len(dataclasses.fields(options)) <= 14


def test_options_are_frozen_and_named():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().strict = False
    with pytest.raises(TypeError):
        Options(KeepLast(1))


@pytest.mark.parametrize(
    "given",
    [
        {"retention": None},
        {"retention": 3},
        {"interval": 0},
        {"interval": -5},
        {"interval": timedelta(0)},
        {"interval": timedelta(seconds=-1)},
        {"deadline_seconds": 0},
        {"deadline_seconds": math.nan},
        {"asynchronous": "queue"},
        {"writers": "some"},
        {"interval": "automatic"},
        {"stop": None},
        {"io": "mmap"},
    ],
    ids=repr,
)
def test_values_out_of_range_are_refused(given):
    (name,) = given
    with pytest.raises(OptionsError, match=name):
        Options(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "mmap"},
        {"full_every": 0},
        {"readers": "some"},
        {"message_bytes": 63},
        {"message_bytes": (1 << 30) + 1},
        {"window_bytes": 0},
        {"digest_threads": 0},
    ],
    ids=repr,
)
def test_ways_of_moving_bytes_out_of_range_are_refused(given):
    (name,) = given
    with pytest.raises(OptionsError, match=name):
        IO(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"interval": 1},
        {"interval": timedelta(milliseconds=1)},
        {"interval": "auto"},
        {"interval": AutoInterval(mtbf=timedelta(hours=6), overhead=0.5)},
        {"stop": StopWhen(halt_file=None, margin_seconds=0)},
        {"stop": StopWhen(exit_code=0)},
        {"stop": StopWhen(exit_code=255)},
        {"asynchronous": "skip"},
        {"io": IO(message_bytes=64)},
        {"io": IO(message_bytes=1 << 30)},
        {"io": IO(full_every=1, window_bytes=1, digest_threads=1)},
        {"preemption_signals": ()},
        {"retention": KeepLast(1) | KeepEvery(10)},
    ],
    ids=repr,
)
def test_values_at_the_border_are_taken(given):
    Options(**given)


def test_an_error_may_end_the_job_or_the_communicator():
    assert Options(abort_on_error="communicator").abort_on_error == "communicator"
    variable = {"MPI_CKPT_ABORT_ON_ERROR": "communicator"}
    assert Options.from_env(variable).abort_on_error == "communicator"
    with pytest.raises(OptionsError, match="abort_on_error is 'world'"):
        Options(abort_on_error="world")
    with pytest.raises(OptionsError, match="MPI_CKPT_ABORT_ON_ERROR='world'"):
        Options.from_env({"MPI_CKPT_ABORT_ON_ERROR": "world"})


def test_all_faults_are_told_at_once():
    with pytest.raises(OptionsError) as caught:
        Options(interval=0, writers="some", deadline_seconds=0)
    assert len(caught.value.problems) == 3
    with pytest.raises(OptionsError) as caught:
        IO(digest_threads=0, window_bytes=0)
    assert len(caught.value.problems) == 2
    assert isinstance(caught.value, ValueError)


def test_no_variables_give_the_defaults():
    assert Options.from_env({"HOME": "/", "MPI_CKPT_DIR": "/x"}) == Options()


def test_every_variable_sets_its_field():
    given = {
        "MPI_CKPT_KEEP_LAST": "7",
        "MPI_CKPT_INTERVAL": "100",
        "MPI_CKPT_REUSE": "0",
        "MPI_CKPT_ABORT_ON_ERROR": "0",
        "MPI_CKPT_DEADLINE_SECONDS": "5.5",
        "MPI_CKPT_MESSAGE_BYTES": "4096",
        "MPI_CKPT_WINDOW_BYTES": "8192",
        "MPI_CKPT_IO": "buffered",
        "MPI_CKPT_WRITERS": "all",
        "MPI_CKPT_READERS": "node",
        "MPI_CKPT_DIGEST_THREADS": "3",
        "MPI_CKPT_LOCK": "lease",
        "MPI_CKPT_READ_ONLY": "0",
        "MPI_CKPT_SYNC_DIRECTORIES": "0",
    }
    assert set(given) == set(ENVIRONMENT)
    assert Options.from_env(given) == Options(
        retention=KeepLast(7),
        interval=100,
        abort_on_error=False,
        deadline_seconds=5.5,
        writers="all",
        lock="lease",
        read_only=False,
        io=IO(
            mode="buffered",
            sync_directories=False,
            reuse=False,
            readers="node",
            window_bytes=8192,
            message_bytes=4096,
            digest_threads=3,
        ),
    )
    fields = {field.name for field in dataclasses.fields(Options)}
    fields |= {f"io.{field.name}" for field in dataclasses.fields(IO)}
    assert {field for field, _, _ in ENVIRONMENT.values()} <= fields


@pytest.mark.parametrize(
    "given",
    [
        {"margin_seconds": -1},
        {"margin_seconds": math.nan},
        {"halt_file": ""},
        {"exit_code": -1},
        {"exit_code": 256},
    ],
    ids=repr,
)
def test_reasons_to_stop_out_of_range_are_refused(given):
    (name,) = given
    with pytest.raises(OptionsError, match=name):
        StopWhen(**given)


def test_a_function_may_be_another_on_each_rank():
    first, other = (Options(stop=StopWhen(asked=lambda: None)) for _ in range(2))
    assert first.describe() == other.describe()


def test_interval_may_be_worked_out():
    assert Options.from_env({"MPI_CKPT_INTERVAL": "auto"}).interval == "auto"


def test_interval_in_seconds_is_a_time():
    assert Options.from_env({"MPI_CKPT_INTERVAL": "0.5s"}).interval == timedelta(
        seconds=0.5
    )


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MPI_CKPT_KEEP_LAST", "0"),
        ("MPI_CKPT_KEEP_LAST", "three"),
        ("MPI_CKPT_INTERVAL", "1.5"),
        ("MPI_CKPT_INTERVAL", "s"),
        ("MPI_CKPT_INTERVAL", "nans"),
        ("MPI_CKPT_INTERVAL", "infs"),
        ("MPI_CKPT_INTERVAL", "0"),
        ("MPI_CKPT_DEADLINE_SECONDS", "soon"),
        ("MPI_CKPT_DEADLINE_SECONDS", "-1"),
        ("MPI_CKPT_MESSAGE_BYTES", "1e6"),
        ("MPI_CKPT_DIGEST_THREADS", ""),
    ],
)
def test_variables_that_cannot_be_used_are_refused(variable, text):
    with pytest.raises(OptionsError):
        Options.from_env({variable: text})


def test_unreadable_variables_are_all_named():
    with pytest.raises(OptionsError) as caught:
        Options.from_env({"MPI_CKPT_KEEP_LAST": "x", "MPI_CKPT_WINDOW_BYTES": "y"})
    assert "MPI_CKPT_KEEP_LAST='x'" in str(caught.value)
    assert "MPI_CKPT_WINDOW_BYTES='y'" in str(caught.value)


def test_description_differs_where_options_do():
    first, other = Options(interval=5).describe(), Options(interval=6).describe()
    assert [name for name in first if first[name] != other[name]] == ["interval"]
    assert Options(interval=5).describe() == first
