# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import time

import pytest

from mpi_ckpt.elastic import requests
from mpi_ckpt.elastic.requests import StopRequests
from mpi_ckpt.errors import OptionsError
from mpi_ckpt.options import StopWhen


class Clock:
    """Stands in for the time module: wall clock and monotonic clock go apart if told to."""

    wall = 1.9e9
    now = 50.0

    def time(self):
        return self.wall

    def monotonic(self):
        return self.now

    def pass_by(self, seconds):
        self.wall += seconds
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(requests, "time", clock)
    for name in ("MPI_CKPT_DEADLINE", "SLURM_JOB_END_TIME", "PBS_WALLTIME"):
        monkeypatch.delenv(name, raising=False)
    return clock


def watch(path, **given):
    found = StopRequests(StopWhen(**given), path)
    found.read_environment()
    return found


def why(requests, clock, save=10.0, step=1.0, after=1.0):
    clock.pass_by(after)
    return requests.reason(save, step)


def test_nothing_asks_to_stop(tmp_path, clock):
    requests = watch(tmp_path / "not there yet")
    assert why(requests, clock) == ""


def test_a_halt_file(tmp_path, clock):
    requests, other = watch(tmp_path), watch(tmp_path, halt_file=None)
    assert why(requests, clock) == ""
    (tmp_path / "halt").touch()
    assert (
        why(requests, clock) == f"{tmp_path}/halt is there; remove it before the next run"
    )
    assert (tmp_path / "halt").exists()
    assert why(other, clock) == ""


def test_a_halt_file_elsewhere(tmp_path, clock):
    requests = watch(tmp_path / "checkpoints", halt_file=str(tmp_path / "stop-all"))
    assert why(requests, clock) == ""
    (tmp_path / "stop-all").mkdir()  # whatever it is
    assert "stop-all is there" in why(requests, clock)


def test_a_halt_file_that_cannot_be_looked_for(tmp_path, clock, caplog):
    requests = watch(tmp_path, halt_file="x" * 5000)
    assert why(requests, clock) == why(requests, clock) == ""
    (text,) = caplog.messages
    assert "is not watched any more" in text


def test_the_file_is_looked_for_once_a_second(tmp_path, clock):
    requests = watch(tmp_path)
    assert why(requests, clock) == ""
    (tmp_path / "halt").touch()
    assert why(requests, clock, after=0.9) == ""
    assert why(requests, clock, after=0.1) != ""


def test_a_function_is_asked_once_a_second(tmp_path, clock):
    answers = [False, None, True]
    requests = watch(tmp_path, asked=lambda: answers.pop(0))
    assert [why(requests, clock) for _ in range(2)] == ["", ""]
    assert why(requests, clock, after=0.5) == ""
    assert len(answers) == 1
    assert why(requests, clock, after=0.5) == "StopWhen.asked said so"


def test_a_function_that_tells_the_seconds_left(tmp_path, clock):
    requests = watch(tmp_path, asked=lambda: answer)
    answer = 1000
    assert why(requests, clock) == ""
    answer = 46.0  # a notice of preemption: the last save takes 15, two steps and 30
    assert why(requests, clock) == (
        "the job ends in 46 s by StopWhen.asked, a save takes 10.0 s"
    )
    assert why(requests, clock, save=100.0, after=0).endswith(
        "100.0 s: that may be too late"
    )
    answer = 1000  # taken back
    assert why(requests, clock) == ""


@pytest.mark.parametrize("answer", ["soon", float("nan"), [], KeyError("x")], ids=repr)
def test_a_function_that_fails_is_asked_no_more(tmp_path, clock, caplog, answer):
    calls = []

    def asked():
        calls.append(1)
        if isinstance(answer, Exception):
            raise answer
        return answer

    requests = watch(tmp_path, asked=asked)
    assert [why(requests, clock) for _ in range(3)] == [""] * 3
    assert len(calls) == 1
    (text,) = caplog.messages
    assert "StopWhen.asked has failed" in text


def test_the_end_of_the_job(tmp_path, clock, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MPI_CKPT_DEADLINE", str(clock.wall + 600))
    requests = watch(tmp_path)
    assert caplog.messages == ["the job ends in 600 s by MPI_CKPT_DEADLINE"]
    assert why(requests, clock, after=552) == ""
    text = "the job ends in 47 s by MPI_CKPT_DEADLINE, a save takes 10.0 s"
    assert why(requests, clock) == text
    assert why(requests, clock, after=50).startswith("the job should have ended 3 s ago by")
    off = watch(tmp_path, wall_time=False)
    assert why(off, clock) == ""


def test_a_clock_that_is_set_later_changes_nothing(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("MPI_CKPT_DEADLINE", str(clock.wall + 600))
    requests = watch(tmp_path)
    clock.wall += 86400
    assert why(requests, clock) == ""


def test_an_end_that_has_passed_before_the_start(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("MPI_CKPT_DEADLINE", str(clock.wall - 86400))
    assert why(watch(tmp_path), clock, save=None, after=0) == (
        "the job should have ended 86400 s ago by MPI_CKPT_DEADLINE"
    )


def test_rubbish_of_the_user_is_an_error_that_of_a_scheduler_a_warning(
    tmp_path, clock, monkeypatch, caplog
):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    requests = watch(tmp_path)
    (text,) = caplog.messages
    assert text.startswith("the end of the job is not known: SLURM_JOB_END_TIME='Unknown'")
    assert why(requests, clock) == ""
    monkeypatch.setenv("MPI_CKPT_DEADLINE", "in an hour")
    with pytest.raises(OptionsError, match="MPI_CKPT_DEADLINE='in an hour' is not a point"):
        watch(tmp_path)
    watch(tmp_path, wall_time=False)


def test_the_real_clock(tmp_path, monkeypatch):
    monkeypatch.setenv("MPI_CKPT_DEADLINE", str(time.time() + 1e6))
    requests = watch(tmp_path)
    assert requests.reason(None, 0.0) == ""
