# SPDX-License-Identifier: Apache-2.0
"""The checks for a machine with a device run on the host, so that none rots."""

import json

import pytest

from tests.device_checks import contents, costs  # noqa: F401 (they add their checks)
from tests.device_checks.bench import CHECKS
from tests.launch import run_job

NEED_A_DEVICE = {"replay_is_refused_with_overlap", "device_memory_of_saves"}


@pytest.mark.full
def test_all_that_means_something_on_the_host_holds():
    job = run_job(2, ["-m", "tests.device_checks"], env={"DEVICE": "cpu", "MIB": "8"})
    assert job.code == 0, job.text
    lines = [json.loads(line) for line in job.out.splitlines() if line.startswith("{")]
    assert [line["check"] for line in lines] == [check.name for check in CHECKS]
    verdicts = {line["check"]: line["verdict"] for line in lines}
    assert {name for name, one in verdicts.items() if one != "ok"} == NEED_A_DEVICE
    assert {verdicts[name] for name in NEED_A_DEVICE} == {"needs a device"}
    assert all(line["figure"] for line in lines if line["verdict"] == "ok")


def test_a_check_that_fails_is_told(monkeypatch, tmp_path):
    """One rank's failure is the verdict."""
    from tests.device_checks import __main__ as program
    from tests.device_checks.bench import Bench, Check

    class TwoRanks:
        rank, size = 0, 2

        def Barrier(self):
            pass

        def allgather(self, mine):
            return [mine, ("failed", "AssertionError: torn")]

    bench = Bench(TwoRanks(), tmp_path, "cpu", 1)
    line = program.run(bench, Check("fine", lambda _: "4 saves"))
    assert line["verdict"] == "failed"
    assert line["figure"] == "AssertionError: torn"
