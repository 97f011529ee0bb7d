# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import time

import pytest

from mpi_ckpt.elastic.requests import (
    JobEnd,
    WallTime,
    end_of_job,
    fits,
    must_save_now,
    parse_deadline,
)
from mpi_ckpt.errors import OptionsError

NOW = 1.9e9


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1900000000", 1.9e9),
        (" 1900000000.5\n", 1900000000.5),
        ("2030-03-17T17:46:40Z", 1.9e9),
        ("2030-03-17T17:46:40+00:00", 1.9e9),
        ("2030-03-17 18:46:40+01:00", 1.9e9),
    ],
)
def test_points_in_time(text, seconds):
    assert parse_deadline(text) == seconds


def test_a_time_without_an_offset_is_local(monkeypatch):
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    try:
        assert parse_deadline("2030-03-17T19:46:40") == 1.9e9
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "text",
    ["3600", "4:00:00", "soon", "nan", "inf", "-1", "1e300", "2030-13-01T00:00:00Z", "%s"],
)
def test_what_is_no_point_in_time_is_refused(text):
    with pytest.raises(
        OptionsError, match="is not a point in time: give seconds since the"
    ):
        parse_deadline(text)


def find(environ, cgroup="0::/user.slice\n", tmp_path=None):
    path = tmp_path / "cgroup"
    path.write_text(cgroup)
    return end_of_job(environ, NOW, path)


def test_nothing_is_told(tmp_path):
    assert find({"HOME": "/root", "MPI_CKPT_DEADLINE": ""}, tmp_path=tmp_path) == WallTime()


def test_slurm_tells_the_end(tmp_path):
    environ = {"SLURM_JOB_ID": "42", "SLURM_JOB_END_TIME": "1900003600"}
    end = WallTime(JobEnd(1900003600.0, "SLURM_JOB_END_TIME"))
    assert find(environ, tmp_path=tmp_path) == end
    ours = "0::/system.slice/slurmstepd.scope/job_42/step_0/user/task_0\n"
    assert find(environ, ours, tmp_path=tmp_path) == end


def test_slurm_with_several_control_groups(tmp_path):
    environ = {"SLURM_JOB_ID": "42", "SLURM_JOB_END_TIME": "1900003600"}
    ours = "4:memory:/slurm/uid_0/job_42/step_batch\n3:freezer:/slurm/uid_0/job_42\n"
    assert find(environ, ours, tmp_path=tmp_path).end is not None


def test_variables_of_another_slurm_job_are_not_believed(tmp_path):
    environ = {"SLURM_JOB_ID": "42", "SLURM_JOB_END_TIME": "1900003600"}
    found = find(environ, "0::/slurm/job_43/step_0\n", tmp_path=tmp_path)
    assert found.end is None
    (text,) = found.ignored
    assert text == (
        "SLURM_JOB_END_TIME is of job 42, this process belongs to job 43: not used"
    )
    # A shell that outlived its job has no control group to tell it by, but an old time.
    environ = {"SLURM_JOB_ID": "42", "SLURM_JOB_END_TIME": str(int(NOW - 7200))}
    found = find(environ, tmp_path=tmp_path)
    assert found.end is None
    assert found.ignored == (
        "SLURM_JOB_END_TIME is 7200 s ago: taken for another job's, not used",
    )


def test_a_job_a_little_over_its_time_is_over(tmp_path):
    environ = {"SLURM_JOB_END_TIME": str(int(NOW - 60))}
    assert find(environ, tmp_path=tmp_path).end == JobEnd(NOW - 60, "SLURM_JOB_END_TIME")


@pytest.mark.parametrize("text", ["tomorrow", "3600", "nan", "NONE", "1e99"])
def test_rubbish_of_a_scheduler_is_not_used(tmp_path, text):
    found = find({"SLURM_JOB_END_TIME": text}, tmp_path=tmp_path)
    assert found.end is None
    assert "is not a point in time: not used" in found.ignored[0]


def test_torque_tells_a_limit_and_the_node_file_the_start(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.touch()
    os.utime(nodes, (NOW - 1000, NOW - 1000))
    environ = {"PBS_JOBID": "7.host", "PBS_WALLTIME": "3600", "PBS_NODEFILE": str(nodes)}
    assert find(environ, tmp_path=tmp_path).end == JobEnd(NOW + 2600, "PBS_WALLTIME")
    # The earlier of two ends counts: a Slurm job within a PBS job, say.
    environ["SLURM_JOB_END_TIME"] = str(NOW + 100)
    assert find(environ, tmp_path=tmp_path).end == JobEnd(NOW + 100, "SLURM_JOB_END_TIME")


@pytest.mark.parametrize(
    "given",
    [
        {"PBS_WALLTIME": "3600", "PBS_NODEFILE": "/nowhere/nodes"},
        {"PBS_WALLTIME": "3600"},
        {"PBS_WALLTIME": "1:00:00", "PBS_NODEFILE": "/"},
    ],
    ids=repr,
)
def test_a_limit_without_a_start_is_not_used(tmp_path, given):
    found = find({"PBS_JOBID": "7", **given}, tmp_path=tmp_path)
    assert found.end is None
    assert "the start of the job is not known" in found.ignored[0]
    assert "set MPI_CKPT_DEADLINE in the job's script" in found.ignored[0]


def test_the_jobs_script_overrules_the_scheduler(tmp_path):
    environ = {"SLURM_JOB_END_TIME": "1900003600", "MPI_CKPT_DEADLINE": "1900000300"}
    end = JobEnd(1900000300.0, "MPI_CKPT_DEADLINE")
    assert find(environ, tmp_path=tmp_path) == WallTime(end)
    # What the user says is believed though it is long ago.
    environ["MPI_CKPT_DEADLINE"] = "1800000000"
    assert find(environ, tmp_path=tmp_path).end == JobEnd(1.8e9, "MPI_CKPT_DEADLINE")
    environ["MPI_CKPT_DEADLINE"] = "60"
    with pytest.raises(OptionsError):
        find(environ, tmp_path=tmp_path)


def must(left, *, first=1e6, save=10.0, step=1.0, margin=30.0):
    return must_save_now(
        left,
        at_first_seconds=first,
        save_seconds=save,
        step_seconds=step,
        margin_seconds=margin,
    )


def test_the_save_begins_early_enough():
    # One and a half times the longest save, two steps, the margin.
    assert (must(47.1), must(47.0)) == (False, True)
    assert not must(90.1, save=None, step=0, margin=0)  # a minute, until one is measured
    assert must(90.0, save=None, step=0, margin=0)
    assert must(-5)


def test_a_save_fits_if_the_longest_of_the_last_ones_does_with_a_tenth_more():
    assert (fits(11.0, 10.0), fits(10.9, 10.0)) == (True, False)
    assert (fits(67.0, None), fits(65.0, None)) == (True, False)  # a minute, until measured
    assert fits(None, 1e6)  # nobody knows of an end
    assert not fits(-1.0, 0.0)


def test_a_short_job_trains_for_half_its_time():
    assert not must(35, first=60)
    assert must(30, first=60)
    # Shorter than one save: it is tried all the same, a save cut off harms nothing.
    assert not must(6, first=10, save=100.0)
    assert must(5, first=10, save=100.0)


def test_a_job_that_starts_after_its_end_stops_at_once():
    assert must(-100, first=-100)
    assert must(0, first=0)
